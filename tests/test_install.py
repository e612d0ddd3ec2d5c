"""``scripts/run`` as a newcomer meets it: in a fresh checkout, on a machine that lacks this or that."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import sysconfig
import time

import pytest

import harness

PATIENCE_S = 100.0


class Checkout:
    """A fresh copy of what ``scripts/run`` needs, and a place elsewhere to call it from."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.root = directory / "check out"
        self.elsewhere = directory / "elsewhere"
        self.elsewhere.mkdir()
        for name in ("proxy", "scripts"):
            shutil.copytree(harness.ROOT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
        # What `import proxy` would find first where the user stands.
        (self.elsewhere / "proxy").mkdir()
        (self.elsewhere / "proxy" / "__main__.py").write_text("raise SystemExit('the wrong one')\n")
        (self.elsewhere / "proxy.py").write_text("raise SystemExit('the wrong one')\n")

    def start(self, *arguments: str, prefix: tuple[str, ...] = (), **environ: str) -> subprocess.Popen[str]:
        """Start ``scripts/run`` from elsewhere."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PROXY_", "PYTHON"))}
        return subprocess.Popen(
            [*prefix, str(self.root / "scripts" / "run"), *arguments],
            cwd=self.elsewhere,
            env=environment | {"PYTHON": sys.executable} | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, prefix: tuple[str, ...] = (), **environ: str) -> subprocess.CompletedProcess[str]:
        """Run ``scripts/run`` to its end."""
        process = self.start(*arguments, prefix=prefix, **environ)
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def path_without_apt(self) -> str:
        """Returns: a search path that has what the script uses, and no apt-get."""
        tools = self.elsewhere / "bin"
        tools.mkdir()
        for name in ("bash", "dirname", "cat", "id", "flock", "rm", "env"):
            found = shutil.which(name)
            assert found is not None, name
            (tools / name).symlink_to(found)
        return str(tools)

    def broken_modules(self, *names: str) -> str:
        """Returns: a directory for PYTHONPATH whose modules can't be imported."""
        directory = self.elsewhere / "broken"
        directory.mkdir(exist_ok=True)
        for name in names:
            (directory / f"{name}.py").write_text(f"raise ImportError('no {name} here')\n")
        return str(directory)


@pytest.fixture
def checkout(tmp_path: pathlib.Path) -> Checkout:
    return Checkout(tmp_path)


def test_first_starts_at_once_share_an_environment_and_the_next_is_quick(checkout: Checkout) -> None:
    both = [checkout.start("--version") for _ in range(2)]
    outputs = [process.communicate(timeout=PATIENCE_S) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "".join(stderr for _, stderr in outputs).count("run: making ") == 1
    assert outputs[0][0] == outputs[1][0]
    assert f"file {checkout.root}/proxy/" in outputs[0][0]
    assert f"{checkout.root}/.venv-run/bin/python" in outputs[0][0]

    # Nothing is asked of pip, and paths are those of where the user stands.
    (checkout.elsewhere / "my.toml").write_text("listen = '127.0.0.1:4711'\n")
    begun_at = time.monotonic()
    done = checkout.run("check", "--json", "--config", "my.toml", PIP_INDEX_URL="http://127.0.0.1:1/")
    assert time.monotonic() - begun_at < 5.0
    assert (done.returncode, done.stderr) == (0, "")
    listen = json.loads(done.stdout)["settings"]["listen"]
    assert (listen["value"], listen["source"]) == ("127.0.0.1:4711", "file:my.toml:1")

    # An environment that is not known to be whole is made anew.
    (checkout.root / ".venv-run" / ".made-for").unlink()
    again = checkout.run("--version", PIP_NO_INDEX="1")
    assert "run: making " in again.stderr


def test_the_environment_of_an_older_python_does_where_no_new_one_can_be_made(checkout: Checkout) -> None:
    """Debian has upgraded Python, and what makes an environment is missing."""
    environment = checkout.root / ".venv-run"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=PATIENCE_S)
    (packages,) = environment.glob("lib/python3*/site-packages")
    (packages / "here.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    (environment / ".made-for").write_text("an older Python\n")
    broken = checkout.broken_modules("ensurepip")
    done = checkout.run("--version", PATH=checkout.path_without_apt(), PYTHONPATH=broken)
    assert done.returncode == 0, done
    assert done.stderr.splitlines()[-1] == "run: going on with the environment that is there"
    assert f"{environment}/bin/python)" in done.stdout


def test_debians_own_packages_do_where_no_environment_can_be_made(checkout: Checkout) -> None:
    done = checkout.run("--version", PATH=checkout.path_without_apt(), PYTHONPATH=checkout.broken_modules("ensurepip"))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"({sys.executable})" in done.stdout
    assert not (checkout.root / ".venv-run").exists()


def test_without_environment_and_packages_it_says_what_to_install(checkout: Checkout) -> None:
    broken = checkout.broken_modules("ensurepip", "urllib3")
    done = checkout.run("--version", PATH=checkout.path_without_apt(), PYTHONPATH=broken)
    assert (done.returncode, done.stdout) == (2, "")
    assert "apt install python3-venv\n" in done.stderr
    assert "apt install python3-urllib3 python3-certifi python3-pythonjsonlogger\n" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_python_that_will_do(checkout: Checkout) -> None:
    absent = checkout.run("--version", PYTHON="/does/not/exist")
    assert (absent.returncode, absent.stdout) == (2, "")
    assert absent.stderr == (
        "run: no /does/not/exist; install Python 3.11 or newer, or name one: PYTHON=/path/to/python3.12\n"
    )
    # Stands for a Python that CI machines do not have.
    old = checkout.elsewhere / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = -c ] && echo 3 9 3.9.2\n')
    old.chmod(0o755)
    refused = checkout.run("--version", PYTHON=str(old))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("run: Python 3.9.2 is too old; Python 3.11 or newer is needed")
    broken = checkout.run("--version", PYTHONHOME="/does/not/exist")
    assert (broken.returncode, broken.stdout) == (2, "")
    assert " does not run as a Python (Fatal Python error: " in broken.stderr


def test_a_python_that_is_named_from_where_the_user_stands(checkout: Checkout) -> None:
    """The script goes to the checkout, from where the name would lead nowhere."""
    here = pathlib.Path(sys.executable).relative_to("/")
    script = f'. "{checkout.root}/scripts/environment"; find_python; cd /proc; "$python" --version'
    done = subprocess.run(
        ["bash", "-c", script],
        cwd="/",
        env=os.environ | {"PYTHON": str(here)},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_checkout_whose_path_has_a_colon_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a:b").mkdir()
    checkout = Checkout(tmp_path / "a:b")
    done = checkout.run("--version")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"run: {checkout.root} has a colon, ")
    assert done.stderr.endswith(f"; move the checkout, or start {checkout.root}/proxy.py\n")


def test_what_lies_where_the_user_stands_is_not_taken_for_a_package(checkout: Checkout) -> None:
    """An empty part of PYTHONPATH is the current directory."""
    (checkout.elsewhere / "urllib3.py").write_text("raise SystemExit('not this one')\n")
    for path in ("", ":/does/not/exist", "/does/not/exist:"):
        done = checkout.run("--version", PYTHONPATH=path)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["run", "bundle", "test", "install", "make-certs"])
def test_an_exported_cdpath_leads_no_script_astray(checkout: Checkout, script: str) -> None:
    """With one, ``cd`` goes to another place of that name, or prints where it went."""
    (checkout.elsewhere / "scripts").mkdir()
    (checkout.elsewhere / "certs").mkdir()
    done = subprocess.run(
        [f"scripts/{script}", *(["--help"] if script == "install" else [])],
        cwd=checkout.root,
        env=os.environ | {"CDPATH": f"{checkout.elsewhere}:.", "PYTHON": "/does/not/exist"},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    if script == "install":
        assert (done.returncode, done.stderr) == (0, "")
        assert "scripts/install --uninstall" in done.stdout
    elif script == "make-certs":
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"made in {checkout.root}/certs: ")
        assert (checkout.root / "certs" / "cert.pem").exists()
    else:
        # It has found its own parts: that there is no such Python is said by another file than itself.
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"{script}: no /does/not/exist; install Python 3.11 or newer")


# Another /run for one process, so that the machine's own docker socket is out of the way; `exec` keeps the process.
_OTHER_RUN = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /run && cd "$0" && exec "$@"')


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a mount of its own")
def test_no_arguments_and_no_docker_socket(checkout: Checkout) -> None:
    done = checkout.run(prefix=(*_OTHER_RUN, str(checkout.elsewhere)))
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "no docker socket here" in done.stderr
    assert "./scripts/run demo" in done.stderr
    assert "--upstream http" in done.stderr
    assert not (checkout.root / ".venv-run").exists(), "it needs no environment to say so"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a mount of its own")
def test_no_arguments_and_a_docker_socket(checkout: Checkout) -> None:
    bind = "import socket; socket.socket(socket.AF_UNIX).bind('/run/docker.sock')"
    process = checkout.start(
        prefix=(*_OTHER_RUN, str(checkout.elsewhere), "sh", "-c", f'"$PYTHON" -c "{bind}" && exec "$0"'),
        PATH=f"{checkout.path_without_apt()}:{os.environ['PATH']}",
        PYTHONPATH=checkout.broken_modules("ensurepip"),
        PROXY_LISTEN="127.0.0.1:0",
    )
    assert process.stderr is not None
    line = json.loads(process.stderr.readline())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_S)
    assert line["event"] == "server.start"
    assert line["settings"]["upstream"] == {"value": "unix:///var/run/docker.sock", "source": "default"}
    assert process.returncode == 0


@pytest.mark.parametrize("script", ["soak", "request-cost"])
def test_scripts_that_start_the_proxy_need_nothing_installed(checkout: Checkout, script: str) -> None:
    shutil.copytree(harness.ROOT / "tests", checkout.root / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    bare = checkout.elsewhere / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True, timeout=PATIENCE_S)
    python = str(bare / "bin" / "python")
    assert subprocess.run([python, "-c", "import urllib3"], stderr=subprocess.DEVNULL, check=False).returncode == 1
    # What is meant for this Python must not reach the other one.
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PROXY_", "PYTHON", "COV"))}
    options = ["--minutes", "0.02", "--seed", "1"] if script == "soak" else ["--json"]
    done = subprocess.run(
        [python, str(checkout.root / "scripts" / script), *options],
        cwd=checkout.elsewhere,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert "run: making " in done.stderr, done
    if "strace" in done.stderr:
        pytest.skip(f"no tracing here: {done.stderr}")
    assert done.returncode == 0, done.stdout + done.stderr


_OF_A_SOAK = "--minutes and --clients must be more than 0, and at most 10000"


@pytest.mark.parametrize(
    ("script", "argument", "text"),
    [
        ("soak", "--minutes=0", _OF_A_SOAK),
        ("soak", "--minutes=nan", _OF_A_SOAK),
        ("soak", "--minutes=-1", _OF_A_SOAK),
        ("soak", "--clients=0", _OF_A_SOAK),
        ("compare_origin", "--rate=0", "--rate must be a number above 0"),
        ("compare_origin", "--size=nan", "--size must be a number above 0"),
    ],
)
def test_numbers_with_which_nothing_would_be_tried_are_refused(script: str, argument: str, text: str) -> None:
    done = subprocess.run(
        [sys.executable, str(harness.ROOT / "scripts" / script), argument],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (2, ""), done
    assert done.stderr.splitlines()[-1] == f"{script}: error: {text}"
