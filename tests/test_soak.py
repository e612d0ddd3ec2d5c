"""A soak: everything at once, every record held against what happened. SOAK_MINUTES says how long; CI takes 2."""

import os
import subprocess
import sys

import pytest

from harness import ROOT

MINUTES = float(os.environ.get("SOAK_MINUTES", "0.3"))


@pytest.mark.timeout(MINUTES * 120 + 120)
def test_a_soak() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "soak"), "--minutes", f"{MINUTES:g}", "--seed", "1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=MINUTES * 120 + 90,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all records true" in done.stdout
