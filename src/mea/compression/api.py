"""The main entry: `compress` turns a model into the same model with a smaller KV cache."""

import time
from dataclasses import replace
from typing import Any

from jaxtyping import Int
from torch import Tensor

from mea.compression.calibrate.layerwise import LayerWalk, check_weights, evaluating
from mea.compression.calibrate.text import calibration_tokens
from mea.compression.check import SelfCheck
from mea.compression.checkpoint import FactorStore
from mea.compression.coding.run import code_plans
from mea.compression.convert import assemble, checked_stock_form, latent_config
from mea.compression.fit import FittedLayer, Target, fit_layers
from mea.compression.options import CompressOptions
from mea.compression.plan import Plan, make_plan
from mea.compression.refine import Refined, refine_layers
from mea.compression.result import Compressed
from mea.models.processes import place
from mea.records import Progress


def compress(
    model: Any,
    tokenizer: Any,
    options: CompressOptions | None = None,
    *,
    progress: Progress | None = None,
    **fields: Any,
) -> Any:
    """Compress a model's KV cache to a fifth of its bytes, or to any other budget.

    Parameters
    ----------
    model
        A causal language model of transformers, of a supported architecture. It is not changed; unchanged
        weights are shared with the result. For this package's decoder, whose mixing is folded first, all are copied.
    tokenizer
        Its tokenizer, for the calibration text.
    options
        By default `CompressOptions` with the `fields`: ``compress(model, tokenizer, keep=0.1)``.
    progress
        Called with the stage's name, the finished layers and all layers.

    Returns
    -------
    PreTrainedModel
        The compressed model, an ordinary transformers model: generate, train and save with it, and load it with
        ``AutoModelForCausalLM``.

    Raises
    ------
    ValueError
        The model is not supported, the budget is impossible, the text is too short, or weights or activations are not
        finite.
    TypeError
        A field is unknown, or `options` and fields are given together.
    ConversionError
        A self-check fails.
    """
    plan = make_plan(model.config, model.dtype.itemsize, CompressOptions.of(options, fields))
    tokens = calibration_tokens(tokenizer, plan.calibration)
    walk = LayerWalk(checked_stock_form(model, tokens), tokens.shape[1])
    return run_plans(walk, tokens, [plan], progress=progress)[0].model


def run_plans(
    walk: LayerWalk,
    tokens: Int[Tensor, "n t"],
    plans: list[Plan],
    *,
    store: FactorStore | None = None,
    progress: Progress | None = None,
) -> list[Compressed]:
    """Carry out plans in one pass over the layers, each with its self-checks.

    A `store` (with one plan) holds the factors of finished layers, from which an interrupted run continues.

    Raises
    ------
    ValueError
        Weights or activations are not finite, or a token is outside the vocabulary.
    ConversionError
        A self-check fails.
    """
    check_weights(walk.model)
    largest, size = int(tokens.max()), walk.model.config.vocab_size
    if largest >= size:
        raise ValueError(
            f"token {largest} is outside the model's vocabulary of {size:,}: the tokenizer belongs to another model"
        )
    ranked = iter(_run_ranked(walk, tokens, [plan for plan in plans if not plan.method.coded], store, progress))
    coded = iter(_run_coded(walk, tokens, [plan for plan in plans if plan.method.coded], store, progress))
    return [next(coded if plan.method.coded else ranked) for plan in plans]


def _run_coded(
    walk: LayerWalk,
    tokens: Int[Tensor, "n t"],
    plans: list[Plan],
    store: FactorStore | None,
    progress: Progress | None,
) -> list[Compressed]:
    """Plans of packed caches."""
    results = []
    for coded in code_plans(walk, tokens, plans, store, progress):
        start = time.perf_counter()
        refined = _refined(walk, coded.model, tokens, coded.plan, store, progress)
        seconds = coded.seconds + time.perf_counter() - start
        results.append(replace(coded, seconds=seconds, refined=refined))
    return results


def _run_ranked(
    walk: LayerWalk,
    tokens: Int[Tensor, "n t"],
    plans: list[Plan],
    store: FactorStore | None,
    progress: Progress | None,
) -> list[Compressed]:
    """Plans of methods that lower ranks."""
    if not plans:
        return []
    if place()[1] > 1:
        raise ValueError(f"{plans[0].method.name} is fitted in one process: start it without torchrun")
    start = time.perf_counter()
    known = store.get if store else lambda _: None
    targets = [Target(plan.method, plan.layout, known) for plan in plans]
    fitted: list[list[FittedLayer]] = [[] for _ in plans]
    with evaluating(walk.model):
        checks = [SelfCheck(walk, tokens) for _ in plans]
        for done, layers in enumerate(fit_layers(walk, tokens, targets), start=1):
            for check, of_plan, layer in zip(checks, fitted, layers, strict=True):
                check.advance(layer)
                of_plan.append(layer._replace(layer=None, full_rank=None))  # large and not needed again
                if store and layer.factors:
                    store.put(layer.index, layer.factors)
            if progress:
                progress("compressing", done, len(walk.layers))
        errors = [check.result() for check in checks]
    seconds = time.perf_counter() - start
    return [
        _finished(walk, tokens, plan, of_plan, error, seconds, store, progress)
        for plan, of_plan, error in zip(plans, fitted, errors, strict=True)
    ]


def _finished(
    walk: LayerWalk,
    tokens: Int[Tensor, "n t"],
    plan: Plan,
    fitted: list[FittedLayer],
    self_check: dict[str, float],
    seconds: float,
    store: FactorStore | None,
    progress: Progress | None,
) -> Compressed:
    """The compressed model, refined if the plan says so; `seconds` is the time before refinement."""
    start = time.perf_counter()
    form, groups = plan.method.form, plan.method.groups
    config = latent_config(walk.model.config, plan.layout, plan.describe(), form, groups)
    compressed = assemble(walk.model, [layer.factors for layer in fitted], config)
    refined = _refined(walk, compressed, tokens, plan, store, progress)
    errors = [layer.relative_output_error for layer in fitted]
    return Compressed(compressed, plan, errors, self_check, seconds + time.perf_counter() - start, refined)


def _refined(
    walk: LayerWalk,
    compressed: Any,
    tokens: Int[Tensor, "n t"],
    plan: Plan,
    store: FactorStore | None,
    progress: Progress | None,
) -> Refined | None:
    """Refine a compressed model in place if the plan says so."""
    refinement = plan.options.refinement
    if not refinement:
        return None
    kept = {"known": store.get_refined, "keep": store.put_refined} if store else {}
    return refine_layers(walk, compressed, tokens, refinement, progress=progress, **kept)
