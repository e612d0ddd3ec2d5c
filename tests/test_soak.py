"""A short soak: everything at once, every record held against what happened."""

import subprocess
import sys

from harness import ROOT


def test_a_short_soak() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "soak"), "--minutes", "0.3", "--seed", "1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all records true" in done.stdout
