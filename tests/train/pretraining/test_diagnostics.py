"""What is told of attention is what a computation by hand gives."""

from typing import Any

import pytest
import torch

from mea.train.pretraining.diagnostics import _by_tokens_seen, attention_diagnostics
from mea.train.pretraining.run import build_model

VARIANTS = ["transformer", "mea", "mea_frequency", "mea_shared", "differential_v1", "talking_heads", "gated"]


@pytest.mark.parametrize("variant", [*VARIANTS, "knocking_heads", "interleaved_heads"])
def test_every_variant_can_be_diagnosed_and_is_left_as_it_was(settings, variant):
    torch.manual_seed(0)
    model = build_model(settings(model={"variant": variant}), 300, 0).eval()
    ids = torch.randint(0, 300, (2, 16))
    before = model(ids).logits
    diagnostics = attention_diagnostics(model, lambda: model(ids, use_cache=False))
    assert len(diagnostics["largest_logit"]) == 2
    assert [len(heads) for heads in diagnostics["head_rms"]] == [4, 4]
    assert ("key_mixing" in diagnostics) == (variant in ("mea", "mea_shared", "interleaved_heads"))
    assert torch.equal(model(ids).logits, before)


def test_logits_rms_and_spectrum_are_those_computed_by_hand(settings):
    """The first layer, from its projections alone; the mixing is set so that its singular values are known."""
    torch.manual_seed(0)
    model = build_model(settings(), 300, 0).eval()
    layer: Any = model.model.layers[0].self_attn
    with torch.no_grad():
        layer.value_mixing.weight.copy_(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])))
    ids = torch.randint(0, 300, (2, 16))
    seen = {}
    hook = layer.o_proj.register_forward_hook(lambda _module, inputs, _out: seen.update(heads=inputs[0]))
    diagnostics = attention_diagnostics(model, lambda: model(ids, use_cache=False))
    hook.remove()
    rms = seen["heads"].view(2, 16, 4, 8).square().mean((0, 1, 3)).sqrt()
    assert diagnostics["head_rms"][0] == pytest.approx(rms.tolist(), rel=1e-5)
    assert diagnostics["value_mixing"][0] == pytest.approx([4, 3, 2, 1])
    assert diagnostics["key_mixing"][1] == pytest.approx([1, 1, 1, 1])

    first: Any = model.model.layers[0]
    x = first.input_layernorm(model.model.embed_tokens(ids))
    q, k = (layer.heads(projection(x)) for projection in (layer.q_proj, layer.k_proj))
    q, k = layer.rotate(q, k, None, None)
    assert len(diagnostics["read_rms"][0]) == 5  # 1, 2, 4, 8 and 16 tokens seen
    value = layer.value_mixing(layer.heads(layer.v_proj(x)))  # the first token reads its own, all heads of it
    assert diagnostics["read_rms"][0][0] == pytest.approx(value[:, 0].square().mean().sqrt().item(), rel=1e-5)

    scores = torch.einsum("bthd,bshd->bhts", q, k) * 8**-0.5
    allowed = torch.ones(16, 16, dtype=torch.bool).tril()
    assert diagnostics["largest_logit"][0] == pytest.approx(scores[..., allowed].max().item(), rel=1e-5)


def test_reads_are_told_by_the_tokens_that_are_seen():
    """A mean of n unrelated values is as loud as 1 / sqrt(n), and a document starts anew."""
    out = torch.randn(4000, 8, 2, 16).cumsum(1) / torch.arange(1, 9)[:, None, None]
    diagnostics = _by_tokens_seen(out, None)
    truth = [(sum(1 / n for n in group) / len(group)) ** 0.5 for group in ([1], [2, 3], [4, 5, 6, 7], [8])]
    assert diagnostics == pytest.approx(truth, rel=0.01)
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    mask[4:, :4] = False
    place = (1 + torch.arange(8) % 4)[None, :, None, None]
    first, second, third, _ = _by_tokens_seen(place.float(), mask[None, None])
    assert (first, second, third) == pytest.approx((1, 6.5**0.5, 4))
