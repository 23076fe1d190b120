"""Diagnostics of attention during training: the largest logits, the RMS of every head, the spectra of the mixing."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mea.attention.base import Attention
from mea.attention.mixing import HeadMixing

Diagnostics = dict[str, list[Any]]


@torch.no_grad()
def attention_diagnostics(model: nn.Module, forward: Callable[[], Any]) -> Diagnostics:
    """Diagnose every attention layer during one forward pass.

    Parameters
    ----------
    model
        Model that contains the attention layers.
    forward
        Runs the model on some rows, without a cache.

    Returns
    -------
    For every layer: ``largest_logit``, of scaled scores that the mask lets through; ``head_rms``, root mean square of
    each head as the output projection gets it; ``read_rms``, that of what attention reads (before norm and
    subtraction) over the tokens that see 1, 2 to 3, 4 to 7, ... tokens; ``key_mixing`` and ``value_mixing``, singular
    values of the mixing matrices, if the layer has scalar ones. Talking heads mix the attention maps: they have no
    scores and reads of single heads.
    """
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    diagnostics: Diagnostics = {name: [[] for _ in layers] for name in ("head_rms", "read_rms")}
    diagnostics["largest_logit"] = [-math.inf] * len(layers)
    with _recorded(layers, diagnostics):
        forward()
    for name in ("key_mixing", "value_mixing"):
        mixings = [getattr(layer, name, None) for layer in layers]
        if any(isinstance(mixing, HeadMixing) for mixing in mixings):
            diagnostics[name] = [_spectrum(mixing) for mixing in mixings]
    return diagnostics


@contextmanager
def _recorded(layers: list[Attention], diagnostics: Diagnostics) -> Iterator[None]:
    """Record scores and heads of every pass into `diagnostics`."""
    hooks = []

    def attend(index: int, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        largest = _largest(layers[index], q, k, mask)
        diagnostics["largest_logit"][index] = max(diagnostics["largest_logit"][index], largest)
        out = type(layers[index]).attend(layers[index], q, k, v, mask)
        diagnostics["read_rms"][index] = _by_tokens_seen(out, mask)
        return out

    def head_rms(index: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heads = inputs[0].float().unflatten(-1, (layers[index].num_heads, -1))
        diagnostics["head_rms"][index] = heads.square().mean((0, 1, 3)).sqrt().tolist()

    try:
        for index, layer in enumerate(layers):
            layer.attend = partial(attend, index)  # on the instance, over the class's method
            hooks.append(layer.o_proj.register_forward_pre_hook(partial(head_rms, index)))
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("attend", None)
        for hook in hooks:
            hook.remove()


def _largest(layer: Attention, q: Tensor, k: Tensor, mask: Any) -> float:
    """Largest scaled score of `q` ``[b, t, h, d]`` with `k` ``[b, h_kv, t, d]`` where a query may look."""
    grouped = q.float().transpose(1, 2).unflatten(1, (k.shape[1], -1))
    scores = grouped @ k.float().mT[:, :, None] * layer.head_dim**-0.5
    t = q.shape[1]
    seen = torch.ones(t, t, dtype=torch.bool, device=q.device).tril() if mask is None else mask[:, :, None]
    return scores.masked_fill(~seen, -torch.inf).max().item()


def _by_tokens_seen(out: Tensor, mask: Any) -> list[float]:
    """Root mean square of `out` ``[b, t, h, e]`` over the tokens that see so many, by powers of two."""
    b, t = out.shape[:2]
    seen = torch.arange(1, t + 1, device=out.device).expand(b, t) if mask is None else mask[:, 0].sum(-1).expand(b, t)
    kinds = seen.double().log2().floor().long().flatten()
    squares = out.float().square().mean((2, 3)).flatten()
    empty = squares.new_zeros(t.bit_length())
    counts = empty.index_add(0, kinds, torch.ones_like(squares))
    return (empty.index_add(0, kinds, squares) / counts).sqrt().tolist()


def _spectrum(mixing: Any) -> list[float]:
    if not isinstance(mixing, HeadMixing):
        return []
    weight = mixing.weight.full_tensor() if isinstance(mixing.weight, DTensor) else mixing.weight
    return torch.linalg.svdvals(weight.float()).tolist()
