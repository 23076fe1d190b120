"""Second moments of keys and values, and of the loss's gradients with respect to them.

To second order, small errors ``e`` of the keys and values ``z = [k; v]`` of a token change the divergence between the
model's next-token distributions before and after by ``E[(g^T e)^2] / 2``, where ``g`` is the gradient of the loss of
labels *drawn from the model's own distribution* (the Fisher information, arXiv 1412.1193). ``E[g g^T]`` therefore is
the metric of errors: it weighs keys against values, heads, channels and layers in one unit, nats per token. The
gradient with respect to keys before RoPE is averaged over all the distances at which the text reads them.

Layers run one at a time, forwards and then backwards, so that only one layer's weights need be in memory. Under
``torchrun`` each process reads some of the windows (`mea.models.processes`), and all get the moments of all windows.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mea.compression.calibrate.layerwise import LayerInputs, LayerWalk, check_activations, check_finite
from mea.compression.calibrate.offload import resident
from mea.compression.checkpoint import FactorStore
from mea.models.processes import interleaved, place, summed
from mea.records import Progress

PART = 2**30  # most bytes of hidden states that are kept between the two passes
SHARES = 4  # least number of parts of the text: after each the sums can be kept
SAMPLE = 2**30  # bytes of keys and values that are kept for fits with rounding
KEPT_EVERY = 30.0  # seconds between the states from which an interrupted calibration continues
BACK, HEAD = 3, 5  # times of a backward pass, and of a weight of the output layer in both passes, as forward passes
RANK = 1e-10  # eigenvalues below this part of the largest are zero
GAIN = 1e-3  # directions with less than this part of the weights' largest gain may vanish in fp32 products


@dataclass
class LayerMoments:
    """Moments of one layer; ``n = g * d``, keys first, before RoPE.

    Attributes
    ----------
    mean, covariance
        Of ``z``, without the first tokens of each window, which a packed cache holds exactly; fp64.
    cost
        ``E[g g^T]`` of the same tokens, in nats per token and unit of ``z``; fp64.
    sample
        Some of the ``z``, fp32.
    head_dim
        ``d``.
    """

    mean: Float[Tensor, " two_n"]
    covariance: Float[Tensor, "two_n two_n"]
    cost: Float[Tensor, "two_n two_n"]
    sample: Float[Tensor, "s two_n"]
    head_dim: int

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {name: getattr(self, name) for name in ("mean", "covariance", "cost", "sample")}


class _Sum:
    """Adds up the moments of a layer. Products are fp32, of numbers less the first window's mean; sums are fp64."""

    def __init__(self) -> None:
        self.count, self.shift = 0, torch.empty(0)
        self.tensors: dict[str, Tensor] = {}
        self.samples: list[Tensor] = []

    def add(self, z: Float[Tensor, "t two_n"], gradient: Float[Tensor, "t two_n"], kept: int) -> None:
        if self.count and self.shift.device != z.device:  # read from a file
            self.load({name: tensor.to(z.device) for name, tensor in self.state().items()})
        if not self.count:
            self.shift, width = z.mean(0), z.shape[1]
            self.tensors = {"sum": z.new_zeros(width, dtype=torch.float64)}
            self.tensors |= {name: z.new_zeros(width, width, dtype=torch.float64) for name in ("square", "cost")}
        centred = z - self.shift
        self.tensors["sum"] += centred.sum(0).double()
        self.tensors["square"] += (centred.T @ centred).double()
        scale = gradient.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        unit = gradient / scale  # gradients may be so small that fp32 products vanish
        self.tensors["cost"] += (unit.T @ unit).double() * scale.double() ** 2
        self.count += len(z)
        self.samples.append(z[torch.linspace(0, len(z) - 1, min(kept, len(z)), device=z.device).long()])

    def state(self) -> dict[str, Tensor]:
        """All that has been added up, by name."""
        counted = {"count": torch.tensor(self.count), "samples": torch.stack(self.samples)}
        return {"shift": self.shift, **counted, **self.tensors}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        state = dict(state)
        self.shift, self.count = state.pop("shift"), int(state.pop("count"))
        self.samples, self.tensors = list(state.pop("samples")), state

    def result(self, head_dim: int) -> LayerMoments:
        """Moments of the tokens of all processes; their covariances are about means of their own."""
        sums, count = self.tensors, summed(self.tensors["sum"].new_tensor(self.count))
        own = sums["sum"] / self.count
        total = summed(sums["sum"] + self.count * self.shift.double())
        mean = total / count
        apart = own + self.shift.double() - mean
        square = sums["square"] - self.count * (torch.outer(own, own) - torch.outer(apart, apart))
        sample = interleaved(torch.stack(self.samples)).flatten(0, 1)
        return LayerMoments(mean, summed(square) / count, summed(sums["cost"]) / count, sample, head_dim)


def layer_moments(
    walk: LayerWalk,
    tokens: Int[Tensor, "n t"],
    first: int,
    seed: int,
    progress: Progress | None = None,
    store: FactorStore | None = None,
) -> list[LayerMoments]:
    """Moments of every layer over the calibration windows.

    Parameters
    ----------
    walk, tokens
        The model, and windows of text.
    first
        Number of tokens at the beginning of each window that are left out.
    seed
        Seed of the drawn labels.
    store
        Stores the sums every `KEPT_EVERY` seconds; an interrupted calibration continues from them.

    Raises
    ------
    ValueError
        Activations or gradients are not finite, the text has too little variety (`check_variety`), or it has fewer
        windows than there are processes.
    """
    layers, (count, length) = walk.layers, tokens.shape
    size = 4 * length * walk.model.config.hidden_size * (len(layers) + 1)
    sums = [_Sum() for _ in layers]
    generator = torch.Generator().manual_seed(seed)
    rank, processes = place()
    own = tokens[rank::processes]
    windows = max(1, min(PART // size, math.ceil(len(own) / SHARES)))
    if not len(own):
        raise ValueError(f"{count} windows of calibration text are fewer than {processes} processes: start fewer")
    skips = [rank, *[processes - 1] * (len(own) - 1)]
    attention = layers[0].self_attn
    width = 2 * attention.k_proj.out_features
    kept = max(16, SAMPLE // (4 * width * len(layers) * count))
    inputs = walk.inputs(length)
    shares, kind = own.split(windows), f"sums-{rank}-of-{processes}"
    begun, started = _continue(store, kind, sums, generator), time.monotonic()
    kept_at = started
    # In units of a window through a layer; weights are what takes time.
    through = sum(parameter.numel() for parameter in layers[0].parameters())
    head = max(1, round(HEAD * walk.model.lm_head.weight.numel() / through))
    window_steps = (1 + BACK) * len(layers) + head
    done, steps = sum(map(len, shares[:begun])) * window_steps, len(own) * window_steps

    def advance(units: int) -> None:
        nonlocal done
        done += units
        if progress:
            progress("calibrating", done, steps)

    advance(0)
    del skips[: windows * begun]
    kept_shares = begun
    try:
        for number, rows in enumerate(shares[begun:], start=begun + 1):
            with torch.no_grad():
                hidden = [walk.embed(rows).float()]
                for index, layer in enumerate(layers):
                    loaded = resident(layer)
                    hidden.append(
                        torch.cat([loaded(window, **inputs[index].without_cache) for window in hidden[-1].split(1)])
                    )
                    check_activations(hidden[-1], index, loaded)
                    advance(len(rows))
            gradient = walk.loss_gradients(rows, hidden.pop(), generator, skips[: len(rows)], partial(advance, head))
            del skips[: len(rows)]
            for index in reversed(range(len(layers))):
                states, loaded = hidden.pop(), resident(layers[index])
                before = []
                for window, upstream in zip(states.split(1), gradient.split(1), strict=True):
                    parts = _backward(loaded, window, inputs[index], upstream)
                    before.append(parts[0])
                    sums[index].add(parts[1][first:], parts[2][first:], kept)
                gradient = torch.cat(before)
                check_finite(gradient, index, "gradients", loaded)
                advance(BACK * len(rows))
            if store and number < len(shares) and time.monotonic() - kept_at >= KEPT_EVERY:
                seconds = store.seconds + time.monotonic() - started
                store.put_state(kind, number, _state(sums, generator) | {"seconds": torch.tensor(seconds)})
                kept_shares, kept_at = number, time.monotonic()
    except KeyboardInterrupt:
        if kept_shares:
            part = sum(map(len, shares[:kept_shares])) / len(own)
            raise KeyboardInterrupt(
                f"{part:.0%} of the calibration is kept: the same command continues there"
            ) from None
        raise
    moments = [total.result(attention.head_dim) for total in sums]
    for index, found in enumerate(moments):
        layer = resident(layers[index])
        for name, moment in found.tensors().items():
            check_finite(moment, index, f"moments of keys and values ({name})", layer)
        check_variety(found, layer, index)
    return moments


def _state(sums: Sequence[_Sum], generator: torch.Generator) -> dict[str, Tensor]:
    tensors = {f"{i}.{name}": tensor for i, total in enumerate(sums) for name, tensor in total.state().items()}
    return tensors | {"generator": generator.get_state()}


def _continue(store: FactorStore | None, kind: str, sums: Sequence[_Sum], generator: torch.Generator) -> int:
    """Read the sums that were kept, if any; how many shares of the text are in them."""
    begun, tensors = store.get_state(kind) if store else (0, {})
    if store and begun:
        store.seconds = tensors["seconds"].item()
        generator.set_state(tensors["generator"])
        for i, total in enumerate(sums):
            total.load({key.split(".")[1]: x for key, x in tensors.items() if key.startswith(f"{i}.")})
    return begun


def check_variety(moments: LayerMoments, layer: Any, index: int) -> None:
    """Refuse moments whose covariance has a lower rank than the layer's own weights give.

    Raises
    ------
    ValueError
        Directions that other texts use do not occur in the calibration text: they would be dropped.
    """
    attention = layer.self_attn
    weight = torch.cat([attention.k_proj.weight, attention.v_proj.weight]).double()
    # A norm maps ones to its gain: channels of gain 0 reach neither keys nor values.
    weight = weight * layer.input_layernorm(torch.ones_like(weight[:1])).double()
    possible = int(torch.linalg.matrix_rank(weight, rtol=GAIN)) if weight.any() else 0
    eigenvalues = torch.linalg.eigvalsh(moments.covariance)
    rank = int((eigenvalues > RANK * eigenvalues[-1].clamp_min(0)).sum()) if eigenvalues[-1] > 0 else 0
    if rank < possible:
        raise ValueError(
            f"the calibration text has too little variety: keys and values of layer {index} take {rank} directions in "
            f"it, and {possible} are possible; give more tokens, or another text"
        )


def _backward(
    layer: Any, window: Float[Tensor, "1 t D"], inputs: LayerInputs, upstream: Float[Tensor, "1 t D"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of a layer's input, its keys and values ``[t, 2 n]``, and their gradients."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Tensor) -> None:
            seen[name] = output

        return hook

    attention = layer.self_attn
    keys = attention.k_norm if hasattr(attention, "k_norm") else attention.k_proj
    handles = [keys.register_forward_hook(note("k")), attention.v_proj.register_forward_hook(note("v"))]
    try:
        with torch.enable_grad():
            start = window.detach().requires_grad_()
            output = layer(start, **inputs.without_cache)
            gradients = torch.autograd.grad(output, [start, seen["k"], seen["v"]], upstream)
    finally:
        for handle in handles:
            handle.remove()
    t = window.shape[1]
    states, slopes = (
        torch.cat([k.detach().reshape(t, -1), v.detach().reshape(t, -1)], 1).float()
        for k, v in ((seen["k"], seen["v"]), gradients[1:])
    )
    return gradients[0], states, slopes
