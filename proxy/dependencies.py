"""Whether the three packages the proxy stands on are there, and the commands that bring them; and how to say so where
standard output or error may be closed.

Standard library only and nothing of the package: this is asked before anything else is imported, so that a machine
without them gets commands to type and no traceback.
"""

import importlib.util
import io
import os
import signal
import sys
import sysconfig

# Module, then the name of its package for apt and for pip.
DEPENDENCIES = (
    ("urllib3", "python3-urllib3", "urllib3"),
    ("certifi", "python3-certifi", "certifi"),
    ("pythonjsonlogger", "python3-pythonjsonlogger", "python-json-logger"),
)


# What a running server is told by; until it hears them they would end it.
ORDERS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def missing_dependencies() -> list[str]:
    """Returns: the modules that can't be found, by their import names."""
    return [module for module, _, _ in DEPENDENCIES if importlib.util.find_spec(module) is None]


def mending_commands(missing: list[str]) -> str:
    """Returns: lines for a person that say what is missing for which Python, and the commands that mend it for that
    one.
    """
    apt = " ".join(apt for module, apt, _ in DEPENDENCIES if module in missing)
    pip = " ".join(pip for module, _, pip in DEPENDENCIES if module in missing)
    python = sys.executable
    commands = ["uv run proxy.py"]
    # PEP 668: pip refuses to install into a Python that belongs to the system.
    if (
        os.path.exists(os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED"))
        and sys.prefix == sys.base_prefix
    ):
        commands.insert(0, f"{python} -m venv packages && packages/bin/pip install {pip}, then packages/bin/python")
    else:
        commands.insert(0, f"{python} -m pip install {pip}")
    if sys.prefix == "/usr" and os.path.exists("/usr/bin/apt-get"):
        commands.insert(0, f"apt install {apt}")
    lines = [f"proxy: error: {python} has no {', '.join(missing)}; one of these mends it:"]
    return "\n  ".join([*lines, *commands]) + "\n"


def open_standard_files() -> None:
    """Put /dev/null where standard input, output or error was closed (``2>&-``).

    Otherwise there is nothing to write to, and the next file that is opened gets the number and what is written to it.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="ascii")
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    # What a locale has no letters for is shown all the same.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_line(text: str) -> None:
    """Write a line, or several, for people to stderr. Raises nothing: the exit status is to say it in any case."""
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except OSError:
        # Or the interpreter would try again at its end, and change the status.
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 2)
        os.close(nothing)


def require_dependencies() -> None:
    """End the process with status 2 and the mending commands if anything is missing. Raises: SystemExit.

    ``ORDERS`` that come from now on wait until somebody unblocks them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, ORDERS)
    open_standard_files()
    missing = missing_dependencies()
    if missing:
        print_line(mending_commands(missing).rstrip("\n"))
        raise SystemExit(2)
