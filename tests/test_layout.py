"""The package keeps to its levels and can be put into one file: rules of the project, checked on the syntax tree."""

import ast
import pathlib
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "proxy"

# A module imports only from lower levels.
LEVELS = {
    0: {"vocabulary", "limits", "grammar", "kernel", "masking", "dependencies"},
    1: {"head", "aborts", "config", "log"},
    2: {"framing", "fields", "endpoint", "reply", "inflight"},
    3: {"docker", "tls", "waiting"},
    4: {"notes", "upstream", "relay"},
    5: {"record"},
    6: {"exchange"},
    7: {"server"},
    8: {"workers"},
    9: {"demo"},
    10: {"cli"},
    11: {"__main__"},
}
LEVEL_OF = {name: level for level, names in LEVELS.items() for name in names}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def siblings(name: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    return {
        node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
    }


def imports(name: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    return {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}


def test_every_module_has_a_level_and_every_level_has_its_modules() -> None:
    assert set(MODULES) == set(LEVEL_OF)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_lower_levels(name: str) -> None:
    wrong = {other: LEVEL_OF[other] for other in siblings(name) if LEVEL_OF[other] >= LEVEL_OF[name]}
    assert not wrong, f"proxy/{name}.py is of level {LEVEL_OF[name]} and imports {wrong}"


def test_the_codec_knows_no_sockets() -> None:
    for name in ("grammar", "head", "framing", "fields"):
        assert not imports(name) & {"socket", "select", "ssl", "os"}, name


def test_urllib3_appears_in_one_module() -> None:
    assert [name for name in MODULES if any(i.split(".")[0] == "urllib3" for i in imports(name))] == ["upstream"]


def test_what_is_dockers_alone_appears_in_one_module() -> None:
    words = ("errorDetail", "vnd.docker", "images/", "/build", "containers", "/exec")
    found = set()
    # The demo plays a docker client and a daemon; the other modules relay, and know neither.
    for name in set(MODULES) - {"demo"}:
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))):
            # Docstrings may speak of it, as an example.
            if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
                text = node.value if isinstance(node.value, str) else node.value.decode("latin-1")
                if "\n" not in text and any(word in text for word in words):
                    found.add(name)
    assert found == {"docker"}


def test_python_without_an_ending_is_checked_too() -> None:
    """The tools find scripts by their ending; those without one are named to each of them."""
    scripts = {
        f"scripts/{path.name}"
        for path in (ROOT / "scripts").iterdir()
        if path.is_file() and not path.suffix and path.read_bytes().startswith(b"#!/usr/bin/env python3")
    }
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert set(tomllib.load(file)["tool"]["ruff"]["extend-include"]) == scripts
    types_checked = next(
        line for line in (ROOT / "scripts" / "test").read_text(encoding="utf-8").splitlines() if "/mypy" in line
    )
    assert scripts <= set(types_checked.split())


def test_the_single_file_is_up_to_date() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "amalgamate.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_a_line_of_the_single_file_leads_back_to_its_module() -> None:
    lines = (ROOT / "proxy.py").read_text(encoding="utf-8").splitlines()
    for number in range(200, len(lines), 997):
        if not lines[number - 1].strip() or lines[number - 1].startswith("# --- "):
            continue
        result = subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "amalgamate.py"), "--locate", str(number)],
            capture_output=True,
            text=True,
            check=True,
        )
        path, _, line = result.stdout.strip().rpartition(":")
        assert (ROOT / path).read_text(encoding="utf-8").splitlines()[int(line) - 1] == lines[number - 1]
