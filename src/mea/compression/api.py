"""The main job: a model in, the same model with a smaller KV cache out."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from mea.compression.allocate.search import allocated
from mea.compression.calibrate.layerwise import check_weights, evaluating
from mea.compression.calibrate.text import Calibration, calibration_tokens
from mea.compression.check import SelfCheck, checked_stock_form
from mea.compression.checkpoint import FactorStore
from mea.compression.convert import LayerFactors, assemble, latent_config
from mea.compression.fit import Target, fit_layers
from mea.compression.methods import DEFAULT_METHOD
from mea.compression.plan import Allocation, Plan, make_plan
from mea.compression.refine import Refined, Refinement, refine_layers
from mea.records import Progress


@dataclass(frozen=True)
class Compressed:
    """A compressed model and how it came about.

    Attributes
    ----------
    lost
        Per layer, the share of the attention output's energy that is lost; 0 where the layer is as it was.
    errors
        Of the two self-checks, see `mea.compression.check`.
    seconds
        For calibration, fit, checks and refinement.
    refined
        What refinement did, if there was any.
    """

    model: Any
    plan: Plan
    lost: list[float]
    errors: dict[str, float]
    seconds: float
    refined: Refined | None = None


def compress(
    model: Any,
    tokenizer: Any,
    *,
    keep: float | None = None,
    budget: str | None = None,
    layout: str | Path | None = None,
    method: str = DEFAULT_METHOD,
    odd: str = "values",
    groups: int = 1,
    calibration: Calibration | None = None,
    allocate: Allocation | bool = False,
    refine: Refinement | int = 0,
    progress: Progress | None = None,
) -> Any:
    """Make a model cache half of what it did, or any other share.

    Parameters
    ----------
    model
        A causal language model of transformers, of a supported architecture. It is left as it is; weights that do not
        change are shared with the result. Of this package's decoder, whose mixing is folded first, all are copied.
    tokenizer
        Its tokenizer, for the calibration text.
    keep, budget, layout, method, odd, groups, refine
        See `mea.compression.plan.make_plan`.
    calibration
        Text, its length and the windows' seed.
    allocate
        Choose ranks layer by layer in the budget, by what they cost on held-out text: `True`, or how.
    progress
        Called with a word, the layers done and the layers in all.

    Returns
    -------
    The compressed model: an ordinary one, to generate with, train, or save and load by ``AutoModelForCausalLM``.

    Raises
    ------
    ValueError
        The model or the budget cannot be, the text is too short, or weights or activations are not finite.
    ConversionError
        The result does not compute what it must.
    """
    plan = make_plan(
        model.config, model.dtype.itemsize, keep=keep, budget=budget, layout=layout, method=method, odd=odd,
        groups=groups, calibration=calibration, allocate=allocate, refine=refine,
    )  # fmt: skip
    tokens = calibration_tokens(tokenizer, plan.calibration)
    model = checked_stock_form(model, tokens)
    plan, _ = allocated(model, tokenizer, tokens, plan, progress)
    return run_plans(model, tokens, [plan], progress=progress)[0].model


def run_plans(
    model: Any,
    tokens: Int[Tensor, "n t"],
    plans: list[Plan],
    *,
    store: FactorStore | None = None,
    progress: Progress | None = None,
) -> list[Compressed]:
    """Carry out plans in one pass over the layers, each ending in its self-checks.

    With a `store` (and one plan), finished layers are kept there and taken from there.

    Raises
    ------
    ValueError
        Weights or activations are not finite, or a token is outside the vocabulary.
    ConversionError
        The result does not compute what it must.
    """
    start = time.perf_counter()
    check_weights(model)
    largest, size = int(tokens.max()), model.config.vocab_size
    if largest >= size:
        raise ValueError(
            f"token {largest} is outside the model's vocabulary of {size:,}: the tokenizer belongs to another model"
        )
    factors: list[list[LayerFactors | None]] = [[] for _ in plans]
    lost: list[list[float]] = [[] for _ in plans]
    known = store.get if store else lambda _: None
    targets = [Target(plan.method, plan.layout, known) for plan in plans]
    with evaluating(model):
        checks = [SelfCheck(model, tokens) for _ in plans]
        for done, fitted in enumerate(fit_layers(model, tokens, targets), start=1):
            for check, found, shares, layer in zip(checks, factors, lost, fitted, strict=True):
                check.advance(layer)
                found.append(layer.factors)
                shares.append(layer.lost)
                if store and layer.factors:
                    store.put(layer.index, layer.factors)
            if progress:
                progress("compressing", done, len(model.model.layers))
        errors = [check.result() for check in checks]
    seconds = time.perf_counter() - start
    results = []
    for plan, found, shares, error in zip(plans, factors, lost, errors, strict=True):
        start = time.perf_counter()
        form, groups = plan.method.form, plan.method.groups
        config = latent_config(model.config, plan.layout, plan.describe(), form, groups)
        made = assemble(model, found, config)
        refined = None
        if plan.refinement:
            kept = {"known": store.get_refined, "keep": store.put_refined} if store else {}
            refined = refine_layers(model, made, tokens, plan.refinement, progress=progress, **kept)
        results.append(Compressed(made, plan, shares, error, seconds + time.perf_counter() - start, refined))
    return results
