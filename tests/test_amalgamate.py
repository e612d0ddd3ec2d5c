"""What the script that writes the single file refuses, and how it leads back from the file to the package.

That the file does what the package does is tested with every scenario; that it is up to date, in ``test_layout``.
"""

import ast
import pathlib
import shutil
import subprocess
import sys

import pytest

import harness

SOUND = {
    "__init__": '"""A package."""\n\n__version__ = "1.2"\n',
    "dependencies": "import sys\n\n\ndef require_dependencies() -> None:\n    sys.stdout.write('all here\\n')\n",
    "zebra": '"""Lowest."""\n\nimport os.path\n\nSTRIPES = [os.path.sep for each in range(3)]\n',
    "apple": "from .zebra import (\n    STRIPES,\n)\n\n\ndef count() -> int:\n    return len(STRIPES)\n",
    "cli": "from . import __version__\nfrom .apple import count\n\n\ndef main() -> str:\n"
    "    return f'{__version__} {count()}'\n",
    "__main__": "import sys\n\nfrom .dependencies import require_dependencies\n\nif __name__ == '__main__':\n"
    "    require_dependencies()\n    from .cli import main\n\n    sys.exit(main())\n",
}


class Checkout:
    """A package of a few lines with the script beside it."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self.file = root / "proxy.py"
        (root / "scripts").mkdir()
        (root / "proxy").mkdir()
        shutil.copy(harness.ROOT / "scripts" / "amalgamate.py", root / "scripts")
        for name, text in SOUND.items():
            self.write(name, text)

    def write(self, name: str, text: str) -> None:
        """Replace a module."""
        (self.root / "proxy" / f"{name}.py").write_text(text)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run Python with a script of the checkout."""
        return subprocess.run(
            [sys.executable, *command], cwd=self.root, capture_output=True, text=True, check=False, timeout=30
        )

    def amalgamate(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the script."""
        return self.run("scripts/amalgamate.py", *arguments)


@pytest.fixture
def checkout(tmp_path: pathlib.Path) -> Checkout:
    return Checkout(tmp_path)


def test_a_sound_package_becomes_one_file_that_runs(checkout: Checkout) -> None:
    assert checkout.amalgamate().returncode == 0
    done = checkout.run("proxy.py")
    assert (done.returncode, done.stdout, done.stderr) == (1, "all here\n" * 2, "1.2 3\n")
    text = checkout.file.read_text()
    modules = ("dependencies", "zebra", "apple", "cli", "__main__")
    assert sorted(modules, key=lambda name: text.index(f"# --- proxy/{name}.py")) == list(modules)
    assert "from ." not in text


def test_check_tells_a_stale_file_and_an_absent_one(checkout: Checkout) -> None:
    absent = checkout.amalgamate("--check")
    checkout.amalgamate()
    fresh = checkout.amalgamate("--check")
    checkout.write("zebra", SOUND["zebra"].replace("range(3)", "range(4)"))
    stale = checkout.amalgamate("--check")
    assert [absent.returncode, fresh.returncode, stale.returncode] == [1, 0, 1]
    assert absent.stderr == stale.stderr
    assert stale.stderr.count("\n") == 1
    assert "range(3)" in checkout.file.read_text(), "a check changes nothing"


def test_every_line_leads_back(checkout: Checkout) -> None:
    checkout.amalgamate()
    lines = checkout.file.read_text().splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("# --- "))
    found = 0
    for number, line in enumerate(lines[begin:], begin + 1):
        if not line.startswith((" ", "def", "STRIPES", "if ")) or "# What the package imports" in line:
            continue
        where = checkout.amalgamate("--locate", str(number)).stdout.strip()
        path, _, at = where.rpartition(":")
        assert (checkout.root / path).read_text().splitlines()[int(at) - 1] == line, where
        found += 1
    assert found >= 10


@pytest.mark.parametrize(
    ("module", "text", "reason"),
    [
        ("apple", "from socket import socket\n", "proxy/apple.py:1: 'from socket import ...': write 'import socket'"),
        ("apple", "import proxy.zebra\n", "proxy/apple.py:1: 'import proxy.zebra': write 'from .module import Name'"),
        ("apple", "from .zebra import *\n", "proxy/apple.py:1: an import of a sibling with 'as' or '*'"),
        ("apple", "\nfrom .zebra import STRIPES as S\n", "proxy/apple.py:2: an import of a sibling with 'as' or '*'"),
        ("apple", "from . import zebra\n", "proxy/apple.py:1: only __version__ may come from the package itself"),
        ("apple", "import os as o\n", "proxy/apple.py:1: an import with 'as'"),
        ("apple", "import os; A = 1\n", "proxy/apple.py:1: a statement on the line of an import, which is dropped"),
        ("apple", "def f():\n    import os\n", "proxy/apple.py:2: an import that is not at the top level"),
        (
            "apple",
            "import typing\nif typing.TYPE_CHECKING:\n    from .zebra import STRIPES\n",
            "proxy/apple.py:3: an import that is not at the top level",
        ),
        (
            "apple",
            "try:\n    from .zebra import STRIPES\nexcept ImportError:\n    pass\n",
            "proxy/apple.py:2: an import that is not at the top level",
        ),
        ("apple", "A = __file__\n", "proxy/apple.py:1: __file__ is used outside __main__"),
        ("apple", "if __name__ == '__main__':\n    pass\n", "proxy/apple.py:1: __name__ is used outside __main__"),
        ("apple", "STRIPES = 1\n", "STRIPES is a top-level name of both proxy/apple.py and proxy/zebra.py"),
        ("apple", "for STRIPES in (): ...\n", "STRIPES is a top-level name of both proxy/apple.py and proxy/zebra.py"),
        ("apple", "class STRIPES: ...\n", "STRIPES is a top-level name of both proxy/apple.py and proxy/zebra.py"),
        (
            "apple",
            "try:\n    STRIPES: int = 1\nexcept OSError: ...\n",
            "STRIPES is a top-level name of both proxy/apple.py and proxy/zebra.py",
        ),
        ("apple", "def os(): ...\n", "os is a top-level name of proxy/apple.py and an imported module"),
        ("zebra", "from .apple import count\n", "imports in a circle among __main__, apple, cli, zebra"),
        ("dependencies", "from .zebra import STRIPES\n", "proxy/dependencies.py imports siblings, and must come first"),
    ],
)
def test_what_cannot_be_one_file_is_refused(checkout: Checkout, module: str, text: str, reason: str) -> None:
    checkout.write(module, text)
    done = checkout.amalgamate()
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"amalgamate: {reason}\n")
    assert not checkout.file.exists()


def test_names_inside_functions_and_comprehensions_are_no_clash(checkout: Checkout) -> None:
    checkout.write(
        "apple", "COUNTS = [STRIPES for STRIPES in ()]\n\n\ndef count():\n    STRIPES = 1\n    return STRIPES\n"
    )
    assert checkout.amalgamate().returncode == 0


def test_a_guarded_import_stays_where_it_is(checkout: Checkout) -> None:
    guarded = "try:\n    import nowhere_to_be_found\nexcept ImportError:\n    STRIPES = 'ab'\n"
    checkout.write("zebra", guarded)
    assert checkout.amalgamate().returncode == 0
    assert guarded in checkout.file.read_text()
    assert checkout.run("proxy.py").stderr == "1.2 2\n"


@pytest.mark.parametrize("arguments", [("--locate",), ("--locate", "x"), ("--help",), ("--check", "x")])
def test_arguments_it_does_not_know(checkout: Checkout, arguments: tuple[str, ...]) -> None:
    done = checkout.amalgamate(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("Write ``proxy.py``")
    assert not checkout.file.exists()


def test_an_older_python_is_told_so_before_anything_it_cannot_run() -> None:
    _, first, second, *_ = ast.parse(harness.SINGLE_FILE.read_text()).body
    assert ast.unparse(first) == "import sys"
    assert isinstance(second, ast.Match)
    assert "Python 3.11 or newer is needed" in ast.unparse(second)
