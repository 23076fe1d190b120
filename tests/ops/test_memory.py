"""Memory that is kept is not asked for again, page by page."""

import os
import platform
import subprocess
import sys

import pytest

from mea.ops.memory import SET_BY_USER

# Page faults of 64 MB (16,384 pages) that are written and freed once more, after as many.
SCRIPT = """
import resource
from mea.ops.memory import keep_freed_memory
kept = {keep} and keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
b"x" * 2**26
before = faults()
b"x" * 2**26
print(int(kept), faults() - before)
"""


def faults(keep: bool, **variables: str) -> tuple[int, int]:
    environment = {name: value for name, value in os.environ.items() if name not in SET_BY_USER} | variables
    command = [sys.executable, "-c", SCRIPT.format(keep=keep)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    return int(found[0]), int(found[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are not told anything")
def test_freed_memory_is_used_again():
    kept, count = faults(keep=True)
    assert kept
    assert count < faults(keep=False)[1] / 4


def test_what_the_user_has_set_stays():
    assert faults(keep=True, MALLOC_TRIM_THRESHOLD_="5")[0] == 0
