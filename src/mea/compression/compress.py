"""The main job: a model in, the same model with a smaller KV cache out."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from mea.compression.card import model_card
from mea.compression.check import SelfCheck, checked_stock_form
from mea.compression.choosing import allocated
from mea.compression.convert import LayerFactors, assemble, latent_config
from mea.compression.cost import estimate
from mea.compression.fit import Target, fit_layers
from mea.compression.methods import DEFAULT_METHOD
from mea.compression.plan import Allocation, Calibration, Plan, make_plan
from mea.compression.refine import Refined, Refinement, refine_layers
from mea.compression.store import FactorStore, check_output, complete_folder, fingerprint
from mea.compression.stream import check_weights, evaluating
from mea.evaluate.cache import cache_size
from mea.evaluate.perplexity import encode_text, perplexity, ratio, start_token, token_losses, windows
from mea.models.fold import stock_config
from mea.models.loading import load, load_config, load_tokenizer, resolve_dtype, weights_mark
from mea.records import make_record, write_record
from mea.texts import load_text, read_again

Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all
MEASURED_TEXT = "wikitext-2-test"
CACHE_TOKENS = 256
SHARD_SIZE = "4GB"  # each is in memory as a whole while it is written


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
    keep, budget, layout, method, odd, refine
        See `mea.compression.plan.make_plan`.
    calibration
        Text, its length and the windows' seed.
    allocate
        Choose widths layer by layer in the budget, by what they cost on held-out text: `True`, or how.
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
        calibration=calibration, allocate=allocate, refine=refine,
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
        made = assemble(model, found, latent_config(model.config, plan.layout, plan.describe(), plan.method.form))
        refined = None
        if plan.refinement:
            kept = {"known": store.get_refined, "keep": store.put_refined} if store else {}
            refined = refine_layers(model, made, tokens, plan.refinement, progress=progress, **kept)
        results.append(Compressed(made, plan, shares, error, seconds + time.perf_counter() - start, refined))
    return results


def compress_to_folder(
    source: str,
    out: str | Path,
    *,
    dtype: str = "auto",
    measure_tokens: int = 4096,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Load, compress, check, measure and save; `options` are those of `make_plan`.

    The folder appears when everything in it is complete. An interrupted run started again with the same arguments goes
    on after the last finished layer, which it finds in ``<out>.partial``.

    Parameters
    ----------
    source
        Folder, GGUF file or hub id.
    out
        A folder that does not exist or is empty.
    measure_tokens
        How much of the WikiText-2 test text the perplexities in the model card are measured on; 0 for none.

    Returns
    -------
    The record that is saved beside the weights.

    Raises
    ------
    ValueError
        For anything that the user can put right; before the weights are loaded wherever it can be known by then.
    OSError
        The result could not be written; nothing half written is left.
    """
    out = Path(out)
    check_output(out)
    given = load_config(source)
    config = stock_config(given)
    plan = make_plan(given, resolve_dtype(given, dtype).itemsize, **options)
    tokens = calibration_tokens(load_tokenizer(source), plan.calibration)
    work = out.with_name(out.name + ".partial")
    weights = f"{resolve_dtype(given, dtype)} {weights_mark(source)}"
    store = FactorStore(work / "layers", fingerprint(config, plan, tokens, weights))
    # What has to be folded first has to be in memory.
    model, tokenizer = load(source, dtype, offload_folder=work / "offload" if config is given else None)
    before = cache_size(model, min(CACHE_TOKENS, config.max_position_embeddings)).bytes_per_token
    model = checked_stock_form(model, tokens)
    _check_space(out.parent, model)
    plan, tried = allocated(model, tokenizer, tokens, plan, progress, work / "layout.json")
    result = run_plans(model, tokens, [plan], store=store, progress=progress)[0]
    record = _measure(source, model, tokenizer, result, before, measure_tokens, progress)
    if tried:
        record["results"]["tried"] = [{"divergence": x.divergence, "widths": list(x.layout.widths)} for x in tried]
    with complete_folder(out, work) as folder:
        result.model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(record), encoding="utf-8")
        write_record(folder / "compression.json", record)
    return record


def preview(source: str, *, dtype: str = "auto", **options: Any) -> dict[str, Any]:
    """What `compress_to_folder` would do with these arguments and what it costs; no weights are read.

    Bytes are those of the cache of one sequence, `memory` is beyond the model's weights.

    Raises
    ------
    ValueError
        As `compress_to_folder`, as far as it can be known without weights.
    """
    given = load_config(source)
    config, kind = stock_config(given), resolve_dtype(given, dtype)
    plan = make_plan(given, kind.itemsize, **options)
    cost, context = estimate(config, plan), config.max_position_embeddings
    return {
        "model": Path(source).name,
        "dtype": str(kind).removeprefix("torch."),
        "widths": [None if pair is None else list(pair) for pair in plan.layout.widths],
        "bytes_per_token_before": plan.bytes_before(1),
        "bytes_per_token": plan.layout.bytes(plan.shape, 1),
        "context": context,
        "bytes_at_context_before": plan.bytes_before(context),
        "bytes_at_context": plan.layout.bytes(plan.shape, context),
        "memory": cost.memory,
        "seconds": cost.seconds,
        **plan.describe(),
    }


def calibration_tokens(tokenizer: Any, calibration: Calibration) -> Int[Tensor, "n t"]:
    """Windows of the calibration text, chosen by the seed from all that it has.

    Each opens with the token that the tokenizer puts before every text, if it has one: what is kept of that token in
    the cache is read by all that follow, and a model may be useless without it. In as many as
    `Calibration.reread` says a part is read again.

    Raises
    ------
    ValueError
        The text is shorter than what is asked for.
    """
    ids = encode_text(tokenizer, load_text(calibration.text))
    rows, wanted = windows(ids, calibration.window, start_token(tokenizer)), calibration.tokens // calibration.window
    if len(rows) < wanted:
        raise ValueError(
            f"{calibration.text} has {len(ids):,} tokens, {len(rows)} calibration windows of {calibration.window}; "
            f"{wanted} are asked for: give a longer text or fewer tokens"
        )
    chosen = rows[calibration.order(len(rows))[:wanted].sort().values]
    return read_again(chosen, calibration.reread, calibration.seed)


def _measure(
    source: str,
    model: Any,
    tokenizer: Any,
    result: Compressed,
    before: float,
    measure_tokens: int,
    progress: Progress | None,
) -> dict[str, Any]:
    plan = result.plan
    length = min(CACHE_TOKENS, model.config.max_position_embeddings)
    results: dict[str, Any] = {
        "cache_bytes_per_token_before": before,
        "cache_bytes_per_token": cache_size(result.model, length).bytes_per_token,
        "layer_lost": result.lost,
        **_told(result.refined),
        "self_check": result.errors,
        "seconds": result.seconds,
    }
    if measure_tokens:
        window = min(plan.calibration.window, model.config.max_position_embeddings)
        tokens = encode_text(tokenizer, load_text(MEASURED_TEXT))[:measure_tokens]

        def losses(name: str, measured: Any) -> Tensor:
            def report(done: int, of: int) -> None:
                if progress:
                    progress(f"measuring {name}", done, of)

            return token_losses(measured, tokens, window, start=start_token(tokenizer), progress=report)

        original, compressed = losses("the original", model), losses("the result", result.model)
        results["perplexity_before"] = perplexity(original).value
        results["perplexity"] = perplexity(compressed).value
        results["perplexity_ratio"] = ratio(compressed, original).value
        results["perplexity_ratio_error"] = ratio(compressed, original).standard_error
    config = {
        "model": Path(source).name,
        "widths": plan.layout.widths,
        "dtype": str(model.dtype).removeprefix("torch."),
        "measured_text": MEASURED_TEXT,
        "measured_tokens": measure_tokens,
        **plan.describe(),
    }
    return make_record("compression", config, results=results, seeds={"calibration": plan.calibration.seed})


def _told(refined: Refined | None) -> dict[str, Any]:
    if refined is None:
        return {}
    layers, divergence = refined
    found: dict[str, Any] = {"refined": [pair and pair._asdict() for pair in layers]}
    return found | ({"refined_divergence": divergence._asdict()} if divergence else {})


def _check_space(folder: Path, model: Any) -> None:
    while not folder.exists():
        folder = folder.parent
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"the result takes {needed / 2**30:.2f} GiB and {folder} has {free / 2**30:.2f} GiB free")
