"""Finds a Python that has what the proxy needs at run time, for the scripts here that start it."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from proxy.dependencies import DEPENDENCIES  # noqa: E402  # found by the line above; it needs none of them


class MissingDependenciesError(Exception):
    """What is missing here, and what brings it."""


def choose_python() -> str:
    """Returns: this Python, or else that of the environment of ``scripts/run``, which is made if there is none yet.

    Raises: MissingDependenciesError.
    """
    modules = ", ".join(module for module, _, _ in DEPENDENCIES)
    ask = f"import {modules}"
    environment = ROOT / ".venv-run" / "bin" / "python"
    for python in (sys.executable, str(environment)):
        if os.path.exists(python) and _succeeds([python, "-c", ask], errors=subprocess.DEVNULL):
            return python
    # It makes an environment on its first start.
    if _succeeds([str(ROOT / "scripts" / "run"), "--version"], PYTHON=sys.executable) and environment.exists():
        return str(environment)
    raise MissingDependenciesError(
        f"{sys.executable} lacks one of {modules}, and no environment could be made\n"
        f"  apt install {' '.join(apt for _, apt, _ in DEPENDENCIES)}"
    )


def start_anew_if_missing() -> None:
    """Replace this process by the same script under a Python that has them. Ends it with 2 where there is none."""
    try:
        python = choose_python()
    except MissingDependenciesError as error:
        sys.stderr.write(f"{pathlib.Path(sys.argv[0]).name}: {error}\n")
        sys.exit(2)
    if python != sys.executable:
        sys.stderr.flush()
        os.execv(python, [python, *sys.argv])


def _succeeds(command: list[str], errors: int | None = None, **environment: str) -> bool:
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=errors, env=os.environ | environment, check=False)
    return done.returncode == 0
