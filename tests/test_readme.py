"""The README's numbers are those of the records."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_table_and_figure_are_what_the_records_say():
    run = subprocess.run([sys.executable, "scripts/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
