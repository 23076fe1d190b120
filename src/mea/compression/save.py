"""Compress a model into a folder: complete, measured, and resumable after an interruption."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from mea.arguments import check_output, unfinished
from mea.compression.api import run_plans
from mea.compression.budget import CodedLayout
from mea.compression.calibrate.layerwise import LayerWalk
from mea.compression.calibrate.text import calibration_tokens
from mea.compression.checkpoint import FactorStore
from mea.compression.convert import checked_stock_form, compressed_config, latent_config
from mea.compression.cost import estimate
from mea.compression.options import CompressOptions
from mea.compression.plan import Plan, make_plan
from mea.compression.refine import Refined
from mea.compression.result import Compressed
from mea.evaluate.perplexity import MEASURED_TEXT, measured_text, perplexity, ratio, text_losses
from mea.evaluate.speed import cache_size
from mea.models.card import model_card, origin
from mea.models.fold import stock_config
from mea.models.layer_code import CODES
from mea.models.loading import load, load_config, load_tokenizer, resolve_dtype, weightless, weights_fingerprint
from mea.models.processes import join, place, wait
from mea.models.saving import save_folder, writing
from mea.names import escaped
from mea.records import Progress, make_record, mean_bits

CACHE_TOKENS = 256


def compress_to_folder(
    source: str,
    out: str | Path,
    options: CompressOptions | None = None,
    *,
    dtype: str = "auto",
    measure_tokens: int = 4096,
    progress: Progress | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Load, compress, check, measure and save.

    Processes of ``torchrun`` divide calibration and measurement among them; the result equals that of one process up to
    rounding. The first process saves. The folder appears when it is complete. Finished layers are kept in
    ``<out>.partial``: the same call continues an interrupted run.

    Parameters
    ----------
    source
        Folder, GGUF file or hub id.
    out
        A folder that does not exist or is empty.
    options
        By default `CompressOptions` with the `fields`.
    dtype
        Dtype of the weights and the cache, ``"auto"`` for the model's own.
    measure_tokens
        Tokens of the WikiText-2 test text for the perplexities in the model card; 0 for none.

    Returns
    -------
    dict
        The record that is saved beside the weights.

    Raises
    ------
    ValueError
        An argument, the model or the text is unsuitable; raised before the weights are loaded if possible. Or another
        process writes the folder.
    OSError
        The result could not be written; no incomplete file is left.
    """
    out = Path(out)
    check_output(out)
    work = unfinished(out)
    options = CompressOptions.of(options, fields)
    with writing(out, work, "layers/*.safetensors"):
        return _compress_to_folder(source, out, work, options, dtype, measure_tokens, progress)


def _compress_to_folder(
    source: str,
    out: Path,
    work: Path,
    options: CompressOptions,
    dtype: str,
    measure_tokens: int,
    progress: Progress | None,
) -> dict[str, Any]:
    check_output(out)  # another process may have written it meanwhile
    join()
    source_config = load_config(source)
    config = stock_config(source_config)
    plan = make_plan(source_config, resolve_dtype(source_config, dtype).itemsize, options)
    tokenizer = load_tokenizer(source)
    tokens = calibration_tokens(tokenizer, plan.calibration)
    measured = measured_text(tokenizer, measure_tokens)
    weights = f"{resolve_dtype(source_config, dtype)} {weights_fingerprint(source)}"
    store = FactorStore(work / "layers", fingerprint(config, plan, tokens, weights))
    folded = config is not source_config
    model, tokenizer = load(
        source, dtype, offload_folder=work / f"offload-{place()[0]}", whole=folded, progress=progress
    )
    before = _bytes_per_token(model, plan, config)
    if plan.method.coded:
        before *= 2 / model.dtype.itemsize  # the unit of the budget is the cache with 16 bits
    model = checked_stock_form(model, tokens)
    _check_space(out.parent, model)
    walk = LayerWalk(model, tokens.shape[1])
    try:
        result = run_plans(walk, tokens, [plan], store=store, progress=progress)[0]
    except ValueError:  # the same run would end here again, and another would be refused
        shutil.rmtree(work, ignore_errors=True)
        raise
    record = _measure(source, model, tokenizer, result, before, measured, progress)
    wait()  # no process has anything left to write beside the result
    if place()[0] == 0:
        save_folder(out, work, result.model, tokenizer, _card(record, origin(source)), "compression.json", record)
    return record


def fingerprint(config: Any, plan: Plan, tokens: Int[Tensor, "n t"], weights: str) -> str:
    """A hash of all that factors depend on: configuration, weights, plan and calibration tokens.

    `weights` identifies the weights and their dtype without reading them all, see
    `mea.models.loading.weights_fingerprint`.
    """
    settings = [config.to_json_string(), plan.describe(), str(plan.layout), tokens.tolist(), weights]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def preview(
    source: str, options: CompressOptions | None = None, *, dtype: str = "auto", **fields: Any
) -> dict[str, Any]:
    """The plan and cost of `compress_to_folder` with these arguments, without reading weights.

    Bytes are the cache of one sequence; `memory` excludes the model's weights.

    Raises
    ------
    ValueError
        As `compress_to_folder`, for errors that do not depend on weights.
    """
    source_config = load_config(source)
    config, kind = stock_config(source_config), resolve_dtype(source_config, dtype)
    plan = make_plan(source_config, kind.itemsize, CompressOptions.of(options, fields))
    cost, layout = estimate(config, plan), plan.layout
    context = layout.context if isinstance(layout, CodedLayout) else config.max_position_embeddings
    return {
        "model": Path(source).name,
        "dtype": str(kind).removeprefix("torch."),
        **plan.layout.described(),
        "bytes_per_token_before": plan.bytes_before(1),
        "bytes_per_token": round(plan.layout.bytes_per_token(plan.shape)),
        "context": context,
        "bytes_at_context_before": plan.bytes_before(context),
        "bytes_at_context": plan.layout.bytes(plan.shape, context),
        "memory": cost.memory,
        "result_bytes": kind.itemsize * sum(p.numel() for p in weightless(_largest(config, plan)).parameters()),
        "seconds": cost.seconds,
        **plan.describe(),
    }


def _largest(config: Any, plan: Plan) -> Any:
    """The configuration of the result; of a packed cache with all components, while its bits are not known."""
    if not isinstance(plan.layout, CodedLayout):
        return latent_config(config, plan.layout, {}, plan.method.form, plan.method.groups)
    sections, numbers = CODES[plan.method.name].sections, 2 * plan.shape.width
    tiers = [pair and [[0, 0, numbers // sections]] * sections for pair in plan.layout.ranks]
    code = {"reading": plan.method.name, "first": plan.layout.first, "recent": plan.layout.recent, "tiers": tiers}
    return compressed_config(config, cache_code=code)


def _measure(
    source: str,
    model: Any,
    tokenizer: Any,
    result: Compressed,
    before: float,
    measured: Int[Tensor, " n"] | None,
    progress: Progress | None,
) -> dict[str, Any]:
    plan = result.plan
    results: dict[str, Any] = {
        "cache_bytes_per_token_before": before,
        "cache_bytes_per_token": _bytes_per_token(result.model, plan, model.config),
        ("layer_expected_loss" if plan.method.coded else "layer_relative_output_error"): result.layers,
        **_refinement_results(result.refined),
        "self_check": result.self_check,
        "seconds": result.seconds,
    }
    if measured is not None:
        window = min(plan.calibration.window, model.config.max_position_embeddings, len(measured))
        original, compressed = (
            text_losses(scored, tokenizer, measured, window, what=what, progress=progress, shared=True)
            for scored, what in ((model, "measuring the original"), (result.model, "measuring the result"))
        )
        results["perplexity_before"] = perplexity(original).value
        results["perplexity"] = perplexity(compressed).value
        relative = ratio(compressed, original)
        results["perplexity_ratio"], results["perplexity_ratio_error"] = relative.value, relative.standard_error
    config = {
        "model": Path(source).name,
        **plan.layout.described(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "measured_text": MEASURED_TEXT,
        "measured_tokens": 0 if measured is None else len(measured),
        **plan.describe(),
    }
    return make_record("compression", config, results=results, seeds={"calibration": plan.calibration.seed})


def _bytes_per_token(model: Any, plan: Plan, config: Any) -> float:
    """Measured bytes of a model's cache for each token of a context: of a packed cache, that of its budget."""
    longest = config.max_position_embeddings
    length = min(plan.layout.context, longest) if isinstance(plan.layout, CodedLayout) else min(CACHE_TOKENS, longest)
    return cache_size(model, length).bytes_per_token


def _card(record: dict[str, Any], fields: dict[str, Any]) -> str:
    config, results = record["config"], record["results"]
    before, after = results["cache_bytes_per_token_before"], results["cache_bytes_per_token"]
    fraction = config.get("calibration_copy_fraction")
    method = ", ".join(f"{name} `{config[name]}`" for name in ("method", "weighting") if name in config)
    summary = (
        f"Compressed with mea {record['versions'].get('mea', '')}: {method}, calibrated on "
        f"{config['calibration_tokens']:,} tokens of the text `{escaped(config['calibration_text'])}`"
        f"{f', {fraction:.0%} of the windows with repeated spans' if fraction else ''}, no training."
    )
    rows = [(f"cache bytes per token ({config['dtype']})", f"{before:,.0f}", f"{after:,.0f}")]
    if "tiers" in config:
        rows[0] = (f"cache bytes per token at {config['context']:,} tokens (original with 16 bits)", *rows[0][1:])
        bits = mean_bits(config["tiers"], config["numbers"])
        rows.append(("components of a layer with 8, 4, 2 and 0 bits, mean", "", ", ".join(map(str, bits))))
        exact = f"the first {config['first']} and the newest {config['recent']}"
        rows.append(("tokens that are kept exactly", "all", exact))
    if "perplexity" in results:
        rows.append((
            f"perplexity, WikiText-2 raw test, first {config['measured_tokens']:,} tokens",
            f"{results['perplexity_before']:.2f}",
            f"{results['perplexity']:.2f} "
            f"({results['perplexity_ratio']:.3f} ± {results['perplexity_ratio_error']:.3f} times)",
        ))  # fmt: skip
    whole = "with all components in full precision" if "tiers" in config else "at full rank"
    for name, check in (("full_rank", f"logit error {whole}"), ("cached", "error of cached decoding in a layer")):
        precision = "fp64" if name == "cached" and "tiers" in config else "fp32"
        rows.append((f"largest relative {check}, {precision}", "", f"{results['self_check'][name]:.1e}"))
    unit = "16-bit KV cache" if "tiers" in config else "KV cache"
    title = f"{config['model']} with {after / before:.0%} of its {unit}"
    header = ("measured", "original", "compressed")
    return model_card(title, summary, header, rows, "compression.json", fields, record)


def _refinement_results(refined: Refined | None) -> dict[str, Any]:
    if refined is None:
        return {}
    layers, divergence = refined
    results: dict[str, Any] = {"refined": [losses and losses._asdict() for losses in layers]}
    return results | ({"refined_divergence": divergence._asdict()} if divergence else {})


def _check_space(folder: Path, model: Any) -> None:
    while not folder.exists():
        folder = folder.parent
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"the result needs {needed / 2**30:.2f} GiB and {folder} has {free / 2**30:.2f} GiB free")
