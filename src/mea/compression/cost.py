"""Estimates of a compression's memory and time, before any weight is loaded."""

import functools
from dataclasses import dataclass
from typing import Any

from mea.compression.budget import CacheShape
from mea.compression.calibrate.statistics import BLOCK_NUMBERS, EVERY
from mea.compression.coding.moments import PART, SAMPLE
from mea.compression.methods.values import CG_STEPS, ROUNDS
from mea.compression.plan import Plan
from mea.ops.device import used_device
from mea.ops.precision import peak_flops

READING = 1.5  # speed of a plain forward pass relative to a fit, both as fractions of peak matrix products


@dataclass(frozen=True)
class Cost:
    """Estimates for a plan.

    Attributes
    ----------
    memory
        Peak bytes, without the weights of a model that is in memory.
    seconds
        On this machine, estimated from the speed of its matrix products.
    """

    memory: int
    seconds: float


def estimate(config: Any, plan: Plan) -> Cost:
    """Memory and time of a plan."""
    width, hidden, tokens = plan.shape.width, config.hidden_size, plan.calibration.tokens
    h, d, t = config.num_attention_heads, plan.shape.head_dim, plan.calibration.window
    if plan.method.coded:
        return _coded_cost(config, plan)
    attention, active, feed_forward = _layer_weights(config, plan.shape)
    layer_weights = attention + feed_forward
    form, value_rank = plan.method.form, max((pair[1] for pair in plan.layout.ranks if pair), default=0)
    rank = form.decoder_ranks(value_rank, value_rank)[1]
    averaged = rank if form.shared else width  # numbers per token in attention-averaged values
    block = max(m for m in range(1, h + 1) if h % m == 0 and (m == 1 or m * averaged <= BLOCK_NUMBERS))
    moments = h // block * (block * averaged) ** 2
    forward = 2 * tokens * (attention + active + t * h * d)
    averages = 2 * tokens * (t * h * (d + averaged) + h * averaged * block * averaged) // EVERY
    solving = 3 * ROUNDS * CG_STEPS * moments * rank
    if plan.method.values:
        averages = solving = 0
    if plan.method.needs_scores:
        forward += 4 * tokens * t * h * d // EVERY
    layers = len(plan.layout.ranks)
    states = 3 * tokens * (2 * hidden + h * d)
    memory = 4 * (states + 3 * layer_weights + moments + 4 * t * t * h)
    work = layers * (forward + averages + solving)
    refined = _refinement_cost(config, plan)
    return Cost(memory + refined[0], (work + refined[1]) / _speed())


def _refinement_cost(config: Any, plan: Plan) -> tuple[int, float]:
    """Memory and operations: forward and backward passes through attention, and one pass through both models."""
    refinement, tokens, hidden = plan.options.refinement, plan.calibration.tokens, config.hidden_size
    if not refinement:
        return 0, 0.0
    attention, active, _ = _layer_weights(config, plan.shape)
    h, d = config.num_attention_heads, plan.shape.head_dim
    part = 2 * tokens * (attention + min(plan.calibration.window, refinement.window) * h * d)
    work = len(plan.layout.ranks) * (3 * refinement.passes * part + 4 * part + 4 * tokens * active)
    return 4 * 4 * tokens * hidden, 1.0 * work + 2 * tokens * hidden * config.vocab_size * 3 * refinement.passes


def _coded_cost(config: Any, plan: Plan) -> Cost:
    """Of a calibration with gradients, and of the transforms."""
    attention, active, feed_forward = _layer_weights(config, plan.shape)
    tokens, layers, width = plan.calibration.tokens, len(plan.layout.ranks), 2 * plan.shape.width
    t, h, d = plan.calibration.window, config.num_attention_heads, plan.shape.head_dim
    through = 2 * tokens * (attention + active + t * h * d)
    head = 6 * tokens * config.hidden_size * config.vocab_size
    work = layers * (4 * through + 4 * tokens * width**2 + 60 * width**3) + head
    part = min(PART, 4 * tokens * config.hidden_size * (layers + 1))
    memory = part + SAMPLE + layers * 16 * width**2 + 12 * (attention + feed_forward) + 16 * t * t * h
    refined = _refinement_cost(config, plan)
    return Cost(memory + refined[0], (work + refined[1]) / _speed())


def reading_seconds(config: Any, shape: CacheShape, tokens: int, window: int) -> float:
    """Time of the uncompressed model on this machine, in fp32, for this number of tokens in such windows."""
    attention, active, _ = _layer_weights(config, shape)
    scores = window * config.num_attention_heads * shape.head_dim // 2  # the kernel skips a part of the masked scores
    layers = config.num_hidden_layers * (attention + active + scores)
    return 2 * tokens * (layers + config.vocab_size * config.hidden_size) / (_speed() * READING)


def _layer_weights(config: Any, shape: CacheShape) -> tuple[int, int, int]:
    """Weights of a layer: of attention, of the feed-forward part that one token uses, and of the whole feed-forward."""
    experts = getattr(config, "num_experts", None)
    one = 3 * config.hidden_size * (getattr(config, "moe_intermediate_size", None) or config.intermediate_size)
    attention = 2 * config.hidden_size * (config.num_attention_heads * shape.head_dim + shape.width)
    return attention, one * (config.num_experts_per_tok if experts else 1), one * (experts or 1)


@functools.cache
def _speed() -> float:
    """Operations per second of the fit: half of the peak of fp32 matrix products."""
    return 0.5 * peak_flops(used_device().type, "float32")
