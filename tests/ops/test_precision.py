"""Which format is fast depends on the processor, and memory that is kept is not asked for again, page by page."""

import multiprocessing
import os
import platform
import resource

import pytest
import torch

from mea.ops.precision import SET_BY_USER, fast_dtype, keep_freed_memory, named_dtype


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


def count_faults(queue: multiprocessing.SimpleQueue, keep: bool, variables: dict[str, str]) -> None:
    """Page faults of 64 MB (16,384 pages) that are written and freed once more, after as many."""
    for name in SET_BY_USER:
        os.environ.pop(name, None)
    os.environ.update(variables)
    kept = keep and keep_freed_memory()
    b"x" * 2**26
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 2**26
    queue.put((kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))


def faults(keep: bool, **variables: str) -> tuple[bool, int]:
    """In a process of its own, because the setting lasts as long as the process."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=count_faults, args=(queue, keep, variables))
    process.start()
    process.join()
    assert process.exitcode == 0
    return queue.get()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are not told anything")
def test_freed_memory_is_used_again():
    kept, count = faults(keep=True)
    assert kept
    assert count < faults(keep=False)[1] / 4


def test_what_the_user_has_set_stays():
    assert not faults(keep=True, MALLOC_TRIM_THRESHOLD_="5")[0]
