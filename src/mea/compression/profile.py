"""Sensitivity profile: compress one layer at a time, and measure the loss on held-out text.

As in arXiv 2601.19611, which uses Pile-CC. Every layer is fitted on the uncompressed model's activations, so that
calibration and profile share one pass. The layers above the compressed one run again, half of the model on average.

Fields of a record of the kind `KIND`: ``config``: ``model``, ``method``, ``keep``, ``text``, ``tokens``, ``window``,
the calibration settings, the number of ``layers`` and ``layouts`` (name -> layers that it compresses); ``results``:
``loss`` of the uncompressed model in nats, and ``layers``, one entry per finished layer with ``added`` (nats),
``standard_error`` (paired) and ``relative_output_error`` of its attention; ``samples``: mean losses of blocks,
uncompressed and per layer.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mea.compression.budget import Layout, preset_layout
from mea.compression.calibrate.layerwise import LayerWalk, evaluating
from mea.compression.calibrate.text import calibration_tokens, held_out_tokens
from mea.compression.convert import checked_stock_form, latent_copy
from mea.compression.fit import Target, fit_layers
from mea.compression.options import CompressOptions
from mea.compression.plan import Plan, make_plan
from mea.evaluate.perplexity import block_means, cross_entropy, ratio
from mea.models.fold import stock_config
from mea.models.lm_head import ROWS, head_logits
from mea.models.loading import load, load_config
from mea.names import BASELINES, DEFAULT_KEEP
from mea.ops.precision import named_dtype
from mea.records import Progress, Record, make_record, read_record, write_record

KIND = "profile"


def profile(
    source: str,
    out: Path,
    options: CompressOptions | None = None,
    *,
    text: str | None = None,
    tokens: int = 4096,
    window: int = 1024,
    dtype: str = "fast",
    progress: Progress | None = None,
) -> Record:
    """Compress one layer at a time and record the added loss; an interrupted run continues from `out`.

    Parameters
    ----------
    source
        Folder, GGUF file or hub id.
    out
        The record. It is written after every layer.
    options
        How each layer is compressed: a fraction and a method.
    text, tokens, window
        The held-out text; by default calibration text that the factors were not fitted on.
    dtype
        Of the scored model; factors are fitted in fp32.

    Raises
    ------
    ValueError
        `out` is not a record of this run; the method has no ranks; or as `mea.compression.api.compress`.
    """
    options, dtype = options or CompressOptions(method=BASELINES[0]), named_dtype(dtype)
    plan = make_plan(load_config(source), 2, options)
    if plan.method.coded:
        raise ValueError(f"a profile is of methods that lower ranks, such as {BASELINES[0]}, not of {options.method}")
    config = _config(source, plan, text, tokens, window, dtype)
    record = _begun(out, config)
    if record and len(record["results"]["layers"]) == config["layers"]:
        return record
    model, tokenizer = load(source, dtype, progress=progress)
    fitted_on = calibration_tokens(tokenizer, plan.calibration)
    walk = LayerWalk(checked_stock_form(model, fitted_on), max(window, fitted_on.shape[1]))
    held_out = _HeldOut(walk, held_out_tokens(tokenizer, plan.calibration, tokens, window, text))
    with evaluating(walk.model):
        return _run(walk, fitted_on, held_out, plan, config, record, out, progress)


def _run(
    walk: LayerWalk,
    tokens: Tensor,
    held_out: "_HeldOut",
    plan: Plan,
    config: dict[str, Any],
    record: Record | None,
    out: Path,
    progress: Progress | None,
) -> Record:
    plain = held_out.losses(held_out.above(held_out.first, 0))
    results: dict[str, Any] = {"loss": plain.double().mean().item(), "seconds": 0.0, "layers": []}
    samples: dict[str, Any] = {"loss_uncompressed": block_means(plain)}
    if record:
        results, samples = record["results"], record["samples"]
    done, hidden, began = len(results["layers"]), held_out.first, time.perf_counter()
    missing = Layout(tuple(None if i < done else pair for i, pair in enumerate(plan.layout.ranks)))
    for (fitted,) in fit_layers(walk, tokens, [Target(plan.method, missing)]):
        index = fitted.index
        if fitted.factors is not None:
            compressed = latent_copy(held_out.layers[index], fitted.factors, fitted.inputs.rotary)
            loss = held_out.losses(held_out.above(held_out.through(hidden, compressed, index), index + 1))
            relative = ratio(loss, plain)
            costs = {"added": math.log(relative.value), "standard_error": relative.standard_error / relative.value}
            results["layers"].append(costs | {"relative_output_error": fitted.relative_output_error})
            samples[f"loss_layer_{index}"] = block_means(loss)
            results["seconds"] += time.perf_counter() - began
            began = time.perf_counter()
            seeds = {"calibration": plan.calibration.seed}
            record = make_record(KIND, config, results=results, samples=samples, seeds=seeds)
            write_record(out, record)
        hidden = held_out.through(hidden, held_out.layers[index], index)
        if progress:
            progress("one layer at a time", index + 1, len(held_out.layers))
    if record is None:
        raise ValueError("the model has no layer to profile")
    return record


class _HeldOut:
    """Windows of held-out text through a model, layer by layer, so that only the layers above a change run again."""

    def __init__(self, walk: LayerWalk, tokens: Int[Tensor, "n t"]):
        self.model, self.tokens = walk.model, tokens
        self.layers: list[Any] = list(walk.model.model.layers)
        self.options = [_cast(inputs.options, walk.model.dtype) for inputs in walk.inputs(tokens.shape[1])]
        self.first = walk.embed(tokens).to(walk.model.dtype)

    @torch.no_grad()
    def through(self, hidden: Float[Tensor, "n t D"], layer: Any, index: int) -> Float[Tensor, "n t D"]:
        """Run all windows through a layer at position `index`."""
        return torch.cat([layer(window, **self.options[index]) for window in hidden.split(1)])

    def above(self, hidden: Float[Tensor, "n t D"], index: int) -> Float[Tensor, "n t D"]:
        """The last layer's output from the input of layer `index`, through uncompressed layers."""
        for number in range(index, len(self.layers)):
            hidden = self.through(hidden, self.layers[number], number)
        return hidden

    @torch.no_grad()
    def losses(self, last: Float[Tensor, "n t D"]) -> Float[Tensor, "n scored"]:
        """Of every token, from the last layer's output."""
        norm, rows = self.model.model.norm, []
        for window, hidden in zip(self.tokens.to(last.device), last, strict=True):
            parts = zip(hidden[:-1].split(ROWS), window[1:].split(ROWS), strict=True)
            rows.append(torch.cat([cross_entropy(head_logits(self.model, norm(own)), ids) for own, ids in parts]))
        return torch.stack(rows)


def _cast(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    tables = tuple(table.to(dtype) for table in options["position_embeddings"])
    return {**options, "position_embeddings": tables, "past_key_values": None}


def _config(source: str, plan: Plan, text: str | None, tokens: int, window: int, dtype: str) -> dict[str, Any]:
    layouts = {}
    for name in ("full", "half", "deep"):
        ranks = preset_layout(plan.shape, name, plan.method.step(plan.shape.head_dim), 0.5).ranks
        layouts[name] = [layer for layer, pair in enumerate(ranks) if pair]
    return {
        **plan.describe(), "model": Path(source).name, "layers": len(plan.layout.ranks),
        "keep": DEFAULT_KEEP if plan.options.keep is None else plan.options.keep,
        "text": text or f"{Path(plan.calibration.text).name}, what the calibration left of it",
        "tokens": tokens, "window": window, "dtype": dtype, "layouts": layouts,
    }  # fmt: skip


def _begun(out: Path, config: dict[str, Any]) -> Record | None:
    """The record of an interrupted run with the same settings, if there is one."""
    if not out.exists():
        return None
    record = read_record(out)
    if record["kind"] != KIND or record["config"] != make_record(KIND, config)["config"]:
        raise ValueError(f"{out} holds another measurement, or one with other settings; choose another file")
    return record


def describe_cost(source: str, tokens: int, window: int) -> str:
    """The cost of a profile in words, without reading weights.

    Raises
    ------
    ValueError
        There is no such model, or it cannot be compressed.
    """
    layers = stock_config(load_config(source)).num_hidden_layers
    passes = layers / 2 + 1
    return (
        f"One calibration, as in mea compress, and {passes:.0f} passes over {tokens // window * window:,} tokens "
        f"({layers} layers; the model runs again above each)."
    )
