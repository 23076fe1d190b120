"""Models with a packed cache decode alike with the Triton kernels and with PyTorch."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'mea[gpu]'")

from coded_models import coded
from mea.ops import triton
from tiny_models import tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@torch.no_grad()
@pytest.mark.parametrize(("reading", "padding"), [("predictive", 3), ("joint", 0)])
def test_logits_are_those_of_the_reference(monkeypatch, reading, padding):
    model = coded("llama", reading).float().to(DEVICE)
    ids = tokens(length=24).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    calls, results = [], []
    for kernels in (False, True):
        monkeypatch.setattr(triton, "usable", lambda *x, here=kernels: here and not torch.is_grad_enabled())
        read = triton.PackedReader.read
        monkeypatch.setattr(triton.PackedReader, "read", lambda *x, read=read: calls.append(x) or read(*x))
        past = model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], use_cache=True)
        last = {"attention_mask": mask, "position_ids": positions[:, -1:], "past_key_values": past.past_key_values}
        results.append(model(ids[:, -1:], **last).logits)
        monkeypatch.undo()
    assert calls
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3 if DEVICE == "cpu" else 3e-2)
