"""One graph per module under torch.compile, and the same numbers as without it."""

import pytest
import torch

from mea.attention.backends import block_mask
from mea.ops.masks import attention_mask

pytestmark = pytest.mark.compile
TERMS = 400  # contractions on the way to an output or gradient: projections, scores, reads, sums over tokens


@pytest.fixture(autouse=True)
def forget_other_graphs():
    """All cases share the code of `forward`, and a compiler keeps eight graphs of one function."""
    torch.compiler.reset()


def run(module, x, **arguments):
    module.zero_grad()
    out = module(x, **arguments)
    out.square().mean().backward()
    return out, {name: p.grad.clone() for name, p in module.named_parameters()}


def test_every_module_is_one_graph(case, agree):
    """Traced and differentiated as one graph, without the code generation, so that all cases are affordable."""
    module = case.build(dtype=torch.float64)
    x = torch.randn(2, 63, module.hidden_size, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for arguments in ({}, {"mask": attention_mask(63, window=9)}):
        out, grads = run(module, x, **arguments)
        out_c, grads_c = run(compiled, x, **arguments)
        agree(out_c, out, terms=TERMS)
        for name, grad in grads.items():
            agree(grads_c[f"_orig_mod.{name}"], grad, terms=TERMS, what=name)


@pytest.mark.parametrize("name", ["mea", "differential_v1"])
def test_generated_code_computes_the_same(name, cases):
    """With code generation too, in bf16: at most twice the error of the same module uncompiled, both against fp64."""
    module = cases[name].build(64, dtype=torch.bfloat16)
    x = torch.randn(2, 111, module.hidden_size, dtype=torch.bfloat16)
    out_c, grads_c = run(torch.compile(module, fullgraph=True), x)
    out, grads = run(module, x)
    exact, exact_grads = run(module.double(), x.double())
    pairs = [(out_c, out, exact)]
    pairs += [(grads_c[f"_orig_mod.{name}"], grads[name], exact_grads[name]) for name in grads]
    for compiled, eager, truth in pairs:
        assert (compiled - truth).abs().max() <= 2 * (eager - truth).abs().max()


@torch.no_grad()  # on a CPU FlexAttention has a forward pass only
def test_flex_backend(case, oracle, agree):
    """FlexAttention traces its mask function even outside torch.compile: hence among these tests."""
    if "flex" not in case.cls.backends:
        with pytest.raises(ValueError, match="backend must be one of 'eager'"):
            case.build(backend="flex")
        return
    module = case.build(16, dtype=torch.float32, backend="flex", window=20)
    x = torch.randn(2, 63, module.hidden_size)
    agree(module(x), oracle(module, x, attention_mask(63, window=20)), TERMS)
    documents = torch.arange(126).view(2, 63) // 25
    actual = module(x, mask=block_mask(63, documents=documents))
    agree(actual, oracle(module, x, attention_mask(63, documents=documents)), TERMS)
