"""Refinement: train the compressed attention of each layer to reproduce the original layer's output.

The closed-form fit uses the original's activations. The inputs of a compressed layer, however, come from compressed
layers below, whose errors accumulate. Refinement goes through the layers from first to last. Each layer reads the
outputs of the refined layers below, and its attention's weights (factors and the four projections) are trained for a
few passes over the calibration windows so that its output approaches the *original's* hidden states after that layer.
This is block-wise reconstruction, as for quantised models (arXiv 2102.05426, 2308.13137). No gradient runs through more
than one layer. A layer that packs its cache is trained with the rounding of components in the loop, whose gradient
passes straight through.

The target is the residual stream after the whole layer. The residual stream before the feed-forward part would take
half of the time, but gains little (docs/LOG.md). Latents of post-RoPE keys must be accurate at every position, not only
at the positions of short windows. So windows start at positions drawn log-uniformly up to the model's limit.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mea.compression.calibrate.layerwise import LayerInputs, LayerWalk, evaluating
from mea.compression.calibrate.offload import resident
from mea.compression.convert import replace_weights
from mea.compression.options import Refinement
from mea.models.lm_head import IGNORED, LMHead, distance
from mea.ops.precision import fast_dtype
from mea.records import Progress

FACTORS = ("head_mixing", "code")  # modules of a compressed attention that hold encoders and decoders
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MEANS = ("code.key_mean", "code.value_mean")
WARMUP = 0.1  # of the steps


class RefinedLayer(NamedTuple):
    """Loss of a layer on the held-out windows before and after: relative squared error of its output per token."""

    before: float
    after: float


class Refined(NamedTuple):
    """Result of a refinement.

    Attributes
    ----------
    layers
        The losses of every layer; None for an uncompressed layer or one that an earlier run refined.
    divergence
        Divergence from the original's next-token distribution in nats per token, before and after training the last
        layer on it; None if it was not trained on it.
    """

    layers: tuple[RefinedLayer | None, ...]
    divergence: RefinedLayer | None


Known = Callable[[int], dict[str, Tensor] | None]
Keep = Callable[[int, dict[str, Tensor]], None]


# Over 60 lines with its arguments and their description; the body is one sequence of steps.
def refine_layers(
    walk: LayerWalk,
    compressed: Any,
    tokens: Int[Tensor, "n t"],
    settings: Refinement,
    *,
    known: Known = lambda _: None,
    keep: Keep = lambda *_: None,
    progress: Progress | None = None,
) -> Refined:
    """Refine a compressed model in place.

    Parameters
    ----------
    walk
        Layer walk of the original model, which does not change.
    compressed
        Result of `mea.compression.convert.assemble`, or of `mea.compression.coding.convert.assemble_coded`. Trained
        weights replace the weights shared with the original.
    tokens
        Calibration windows.
    known, keep
        Functions that return the weights of a layer refined by an earlier run, and that store new ones.

    Raises
    ------
    ValueError
        There are fewer than three windows, or `mea.models.lm_head` does not support the model's logits.
    """
    rows = tokens if tokens.shape[1] % settings.window else tokens.reshape(-1, settings.window)
    if len(rows) < 3:
        raise ValueError(f"refinement needs at least 3 windows of calibration text, not {len(rows)}: give more tokens")
    generator = torch.Generator().manual_seed(settings.seed)
    positions = spread_positions(rows.shape[0], rows.shape[1], walk.model.config.max_position_embeddings, generator)
    losses: list[RefinedLayer | None] = []
    divergence = None
    LMHead(walk.model)  # refuses an unsupported head before any work
    with evaluating(walk.model), evaluating(compressed), torch.no_grad():
        inputs, turns = walk.inputs(rows.shape[1]), walk.position_embeddings(positions)
        original = walk.embed(rows).float()
        ours = original
        for index, (reference, changed) in enumerate(zip(walk.layers, compressed.model.layers, strict=True)):
            reading = _Reading(inputs[index], turns[index], positions)
            target = reading.all(resident(reference), original)
            layer, weights, loss = resident(changed), known(index), None
            if any(hasattr(changed.self_attn, part) for part in FACTORS):
                layer = copy.deepcopy(layer)
                if weights is None:
                    loss = _train(_Errors(layer, reading, ours, target), settings, index)
                    if index == len(walk.layers) - 1:
                        divergences = _Divergences(layer, reading, ours, target, walk.model)
                        divergence = _train(divergences, settings, index + 1)
                    weights = {name: weight.detach() for name, weight in _trained(layer.self_attn).items()}
                    keep(index, weights)
                else:
                    layer.self_attn.load_state_dict(weights, strict=False)
                replace_weights(changed.self_attn, weights)
            losses.append(loss)
            ours, original = reading.all(layer, ours), target
            if progress:
                progress("refining", index + 1, len(walk.layers))
    return Refined(tuple(losses), divergence)


def spread_positions(windows: int, length: int, most: int, generator: torch.Generator) -> Int[Tensor, "windows length"]:
    """Consecutive positions below `most` for each window; starts are 0 or log-uniform, equally often per octave."""
    octaves = math.log2(max(1, most // length))
    powers = torch.rand(windows, generator=generator) * (octaves + 1) - 1  # below 0: at the beginning
    starts = torch.where(powers < 0, 0.0, length * 2**powers).long().clamp_max(max(0, most - length))
    return starts[:, None] + torch.arange(length)


class _Reading:
    """Runs windows through one layer, each at its own positions."""

    def __init__(
        self,
        inputs: LayerInputs,
        turns: tuple[Float[Tensor, "n t d"], Float[Tensor, "n t d"]],
        positions: Int[Tensor, "n t"],
    ):
        self.positions = positions
        self.options = inputs.without_cache
        self.turns = turns

    def __call__(self, layer: Any, hidden: Float[Tensor, "b t D"], which: Tensor | slice) -> Float[Tensor, "b t D"]:
        """Run the windows with the indices `which`."""
        options = self.options | {"position_embeddings": (self.turns[0][which], self.turns[1][which])}
        if "position_ids" in options:  # needed to rotate pre-RoPE keys
            options["position_ids"] = self.positions[which].to(hidden.device)
        with _fast_products(hidden.device):
            return layer(hidden, **options).float()

    @torch.no_grad()
    def all(self, layer: Any, hidden: Float[Tensor, "n t D"]) -> Float[Tensor, "n t D"]:
        """Run all windows, one by one."""
        return torch.cat([self(layer, hidden[i : i + 1], slice(i, i + 1)) for i in range(len(hidden))])


def _fast_products(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 if the device multiplies it faster."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_dtype(device) == torch.bfloat16)


def _trained(attention: Any) -> dict[str, Tensor]:
    """The trained matrices: factors and projections, without the means of a packed cache."""
    names = (*FACTORS, *PROJECTIONS)
    trained = {n: p for n, p in attention.named_parameters() if n.split(".")[0] in names and p.dim() > 1}
    return {name: parameter for name, parameter in trained.items() if name not in MEANS}


class _Errors:
    """Relative squared error per token of a layer's output, for some windows."""

    def __init__(self, layer: Any, reading: _Reading, hidden: Float[Tensor, "n t D"], target: Float[Tensor, "n t D"]):
        self.layer, self.reading, self.hidden, self.target = layer, reading, hidden, target
        self.weight = 1 / target.square().mean(-1, keepdim=True)

    def __len__(self) -> int:
        return len(self.hidden)

    def __call__(self, which: Tensor) -> Tensor:
        error = self.reading(self.layer, self.hidden[which], which) - self.target[which]
        return (error.square().mean(-1, keepdim=True) * self.weight[which]).mean()


class _Divergences(_Errors):
    """Divergence per token of the next-token distribution after the last layer, for some windows.

    Final norm and LM head are the original's in both models.
    """

    def __init__(self, layer: Any, reading: _Reading, hidden: Tensor, target: Tensor, model: Any):
        super().__init__(layer, reading, hidden, target)
        self.norm = copy.deepcopy(resident(model.model.norm)).requires_grad_(False)
        self.head = LMHead(model, resident(model.get_output_embeddings()), frozen=True)

    def __call__(self, which: Tensor) -> Tensor:
        with _fast_products(self.hidden.device):
            own, other = (self.norm(x).flatten(0, 1) for x in (
                self.reading(self.layer, self.hidden[which], which), self.target[which]
            ))  # fmt: skip
            labels = torch.full(own.shape[:1], IGNORED, device=own.device)
            return distance(own, self.head, (other, self.head), labels)[0]


def _train(loss: _Errors, settings: Refinement, number: int) -> RefinedLayer:
    """Train one layer's attention in place; its loss on held-out windows does not rise."""
    generator = torch.Generator().manual_seed(
        settings.seed + number
    )  # one per layer: a continued run may start at any layer
    windows = torch.arange(len(loss))
    chosen = windows % settings.held_out == settings.held_out - 1
    chosen[-1] = True
    held_out, rest = windows[chosen], windows[~chosen]

    def score() -> float:
        parts = held_out.split(settings.batch)
        return sum(loss(part).item() for part in parts) / len(parts)

    before = score()
    loss.layer.requires_grad_(False)
    trained = _trained(loss.layer.self_attn)
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    # Of latents the projection of values is an encoder.
    factors = FACTORS + (("v_proj",) if hasattr(loss.layer.self_attn, "head_mixing") else ())
    fast = [p for n, p in trained.items() if n.startswith(factors)]
    slow = [p for n, p in trained.items() if not n.startswith(factors)]
    groups = [{"params": fast, "lr": settings.lr}, {"params": slow, "lr": settings.base_lr}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    steps = settings.passes * -(-len(rest) // settings.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _lr_factor(step, steps))
    with torch.enable_grad():
        for parameter in trained.values():
            parameter.requires_grad_(True)
        for _ in range(settings.passes):
            for which in rest[torch.randperm(len(rest), generator=generator)].split(settings.batch):
                optimiser.zero_grad()
                loss(which).backward()
                optimiser.step()
                schedule.step()
    loss.layer.requires_grad_(False)
    after = score()
    if not after < before:  # also if it is NaN
        for name, parameter in trained.items():
            parameter.copy_(start[name])
        after = before
    return RefinedLayer(before, after)


def _lr_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine decay."""
    return min(1.0, (step + 1) / max(1.0, WARMUP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
