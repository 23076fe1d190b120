"""Which format is fast depends on the processor, and memory that is kept is not asked for again, page by page."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from mea.ops.precision import SET_BY_USER, fast_dtype, named_dtype


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx2": True, "avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({}, torch.float32),
    ],
)
def test_bfloat16_only_where_the_processor_multiplies_it(monkeypatch, able, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert fast_dtype("cpu") == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert getattr(torch, named_dtype("fast")) == expected
    assert named_dtype("float16") == "float16"


# Page faults of 64 MB (16,384 pages) that are written and freed once more, after as many. In a process of its own,
# because the setting lasts as long as the process and its forks.
SCRIPT = """
import resource
from mea.ops.precision import keep_freed_memory
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
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    kept, count = output.split()
    return int(kept), int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are not told anything")
def test_freed_memory_is_used_again():
    kept, count = faults(keep=True)
    assert kept
    assert count < faults(keep=False)[1] / 4


def test_what_the_user_has_set_stays():
    assert not faults(keep=True, MALLOC_TRIM_THRESHOLD_="5")[0]
