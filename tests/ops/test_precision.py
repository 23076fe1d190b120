"""Which format is fast depends on the processor, not on taste."""

import pytest
import torch

from mea.ops.precision import fast_dtype, named_dtype


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
