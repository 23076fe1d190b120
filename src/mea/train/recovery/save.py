"""Recovery of a folder that `mea compress` wrote: trained weights, model card and record in a new folder."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mea.arguments import check_output, unfinished
from mea.evaluate.perplexity import MEASURED_TEXT, measured_text, perplexity, ratio, text_losses
from mea.models.card import model_card, origin
from mea.models.loading import load, load_config, load_tokenizer, weightless, weights_fingerprint
from mea.models.processes import join, place, wait
from mea.models.saving import save_folder, writing
from mea.names import escaped
from mea.ops.device import used_device
from mea.ops.precision import peak_flops
from mea.records import Progress, Record, make_record, write_atomically
from mea.train.recovery.api import Recovered, check_pair, describe, recover
from mea.train.recovery.data import overlaps, windows
from mea.train.recovery.settings import Recovery

KIND = "recovery"
TESTED = ("wikitext-2-test", "wikitext-2-valid", "technical")
MEASURED_WINDOW = 1024
# Speed of a training step of a small model relative to one large matrix product. On CPUs, whose bf16 products may be
# ten times as fast as those in fp32, memory sets the limit: experiments/recovery/records have 0.6e11 to 1.7e11
# operations per second and core, where fp32 products have 1.2e11. A packed cache takes longer.
OF_PEAK, OF_FLOAT32_PEAK_ON_CPU, PACKED = 0.4, 0.9, 0.6


def recover_to_folder(
    source: str,
    out: str | Path,
    stages: Sequence[Recovery],
    texts: Sequence[str],
    *,
    original: str | None = None,
    sharded: bool = False,
    measure_tokens: int = 4096,
    progress: Progress | None = None,
) -> Record:
    """Train a compressed model's folder, stage by stage, and save the best state as an ordinary model folder.

    Models are loaded onto the device of `mea.ops.device.use_device`, trained and measured there.

    The folder appears when it is complete. The same call continues an interrupted run from its last checkpoint in
    ``<out>.partial``.

    Parameters
    ----------
    source
        Folder that `mea compress` wrote.
    out
        A folder that does not exist or is empty.
    stages
        Stages in order; each begins with the best state of the stage before, on text that no earlier stage has seen.
    texts
        Packaged names or files.
    original
        The uncompressed model; not needed for plain pretraining.
    measure_tokens
        Tokens of WikiText-2 test for the model card; 0 for none. They do not affect training.

    Raises
    ------
    ValueError
        An argument, a model or a text is unsuitable; raised before weights are loaded if possible. Or another process
        writes the folder.
    DivergedError
        The loss is NaN or infinite.
    """
    out = Path(out)
    check_output(out)
    work = unfinished(out)
    with writing(out, work, "stage-*/checkpoint-*"):
        return _recover_to_folder(source, out, work, stages, texts, original, sharded, measure_tokens, progress)


def _recover_to_folder(
    source: str,
    out: Path,
    work: Path,
    stages: Sequence[Recovery],
    texts: Sequence[str],
    original: str | None,
    sharded: bool,
    measure_tokens: int,
    progress: Progress | None,
) -> Record:
    config = _checked_config(source, out, original, stages, texts, sharded)
    join()
    tokenizer = load_tokenizer(source)
    scored = measured_text(tokenizer, measure_tokens)
    drawn = _drawn(tokenizer, texts, stages)
    _check_same_run(work, source, original, stages, drawn)
    shared = overlaps(texts, TESTED)

    results = _train(source, original, stages, drawn, work, sharded, progress)
    record: Record = {}
    if place()[0] == 0:
        model = results[-1].model
        measured = _measured(source, original, model, tokenizer, scored, progress)
        record = _record(source, original, config, stages, texts, results, shared, measured, measure_tokens)
        model = model.to(model.config.dtype or torch.float32)
        earlier = [Path(source, "compression.json")]
        save_folder(out, work, model, tokenizer, _card(record, origin(source)), "recovery.json", record, earlier)
    wait()
    return record


def recovery_seconds(source: str, settings: Recovery) -> float:
    """Seconds of a stage in one process on this machine when idle, without reading weights.

    Each token needs one product with every weight of the student, two more for gradients, and one of the original.
    """
    config = load_config(source)
    model = weightless(config)
    embedding = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    original = settings.objective != "text"
    trained = settings.steps * settings.step_tokens * (3 + original + settings.less_memory)
    scored = (1 + settings.evaluations) * settings.held_out * (1 + original)
    device = used_device().type
    speed = OF_PEAK * peak_flops(device, settings.precision)
    if device == "cpu":
        speed = min(speed, OF_FLOAT32_PEAK_ON_CPU * peak_flops(device, "float32"))
    if getattr(config, "cache_code", None):
        speed *= PACKED
    return 2 * (model.num_parameters() - embedding) * (trained + scored) / speed


def _checked_config(
    source: str, out: Path, original: str | None, stages: Sequence[Recovery], texts: Sequence[str], sharded: bool
) -> Any:
    """The configuration of the compressed model, after what can be refused without its weights is refused."""
    check_output(out)
    if not texts:
        raise ValueError("no text to train on: give at least one (--text FILE)")
    if sharded and len(stages) > 1:
        raise ValueError("sharded recovery does one stage at a time: run the next stage on the folder of this stage")
    config, original_config = load_config(source), load_config(original) if original else None
    for settings in stages:
        check_pair(config, original_config, settings)
    return config


Drawn = list[tuple[Int[Tensor, "n t"], Int[Tensor, "m t"]]]


def _drawn(tokenizer: Any, texts: Sequence[str], stages: Sequence[Recovery]) -> Drawn:
    """Windows of every stage, on text that no stage before has seen."""
    drawn, before = [], 0
    for settings in stages:
        drawn.append(windows(tokenizer, texts, settings, skip=before))
        before += settings.steps * settings.step_tokens
    return drawn


def _check_same_run(work: Path, source: str, original: str | None, stages: Sequence[Recovery], drawn: Drawn) -> None:
    run = {
        "weights": [weights_fingerprint(source), weights_fingerprint(original) if original else None],
        "stages": [describe(settings) for settings in stages],
        "tokens": [hashlib.sha256(rows.numpy().tobytes()).hexdigest() for rows, _ in drawn],
    }
    path = work / "run.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(run)):
        raise ValueError(
            f"{work} holds an interrupted run of another model, text or settings; remove it, or give the same settings"
        )
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(run))


def _train(
    source: str,
    original: str | None,
    stages: Sequence[Recovery],
    drawn: Drawn,
    work: Path,
    sharded: bool,
    progress: Progress | None,
) -> list[Recovered]:
    """The results of the stages; each begins with the best state of the stage before."""
    model = load(source, "float32", whole=True, progress=progress)[0]
    teacher = load(original, "float32", whole=True, progress=progress)[0] if original else None
    results: list[Recovered] = []
    for number, (settings, (rows, held_out)) in enumerate(zip(stages, drawn, strict=True), start=1):
        folder = work / f"stage-{number}"
        results.append(recover(model, teacher, rows, held_out, settings, folder, sharded=sharded, progress=progress))
        model = results[-1].model
    return results


def _measured(
    source: str,
    original: str | None,
    model: Any,
    tokenizer: Any,
    tokens: Int[Tensor, " n"] | None,
    progress: Progress | None,
) -> dict[str, float]:
    if tokens is None:
        return {}
    window = min(MEASURED_WINDOW, model.config.max_position_embeddings, len(tokens))

    def losses(model: Any, what: str) -> Tensor:
        return text_losses(model, tokenizer, tokens, window, what=f"measuring {what}", progress=progress)

    own, start = losses(model, "the result"), losses(load(source, "float32")[0], "the start")
    measured = {"perplexity": perplexity(own).value, "perplexity_start": perplexity(start).value}
    if original:
        reference = losses(load(original, "float32")[0], "the original")
        measured["perplexity_original"] = perplexity(reference).value
        for name, values in (("ratio", own), ("ratio_start", start)):
            estimate = ratio(values, reference)
            measured |= {name: estimate.value, f"{name}_error": estimate.standard_error}
    return measured


def _record(
    source: str,
    original: str | None,
    config: Any,
    stages: Sequence[Recovery],
    texts: Sequence[str],
    results: Sequence[Recovered],
    shared: int,
    measured: dict[str, float],
    count: int,
) -> Record:
    first, best = results[0].curve[0], results[-1].best
    return make_record(
        KIND,
        {
            "model": Path(source).name,
            "original": Path(original).name if original else None,
            "texts": [Path(text).name for text in texts],
            "stages": [describe(settings) for settings in stages],
            "compression": config.compression,
            "measured_text": MEASURED_TEXT,
            "measured_tokens": count,
        },
        seeds={"windows": stages[0].seed},
        results={
            "held_out_start": first,
            "held_out": best,
            "shared_13_word_runs": shared,
            "seconds": sum(result.seconds for result in results),
            **measured,
        },
        samples={"curves": [r.curve for r in results], "losses": [r.losses for r in results]},
    )


def _card(record: Record, fields: dict[str, Any]) -> str:
    config, results = record["config"], record["results"]
    tokens = sum(stage["tokens"] for stage in config["stages"])
    start, end = results["held_out_start"], results["held_out"]
    texts = ", ".join(map(escaped, config["texts"]))
    summary = (
        f"A model with a compressed KV cache, trained for {tokens:,} tokens of {texts}; its state was chosen by text "
        "held out from these."
    )
    rows = [("cross-entropy of held-out text, nats per token", f"{start['ce']:.4f}", f"{end['ce']:.4f}")]
    if "perplexity" in results:
        text = f"perplexity, {config['measured_text']}, first {config['measured_tokens']:,} tokens"
        rows.append((text, f"{results['perplexity_start']:.2f}", f"{results['perplexity']:.2f}"))
    if "ratio" in results:
        rows.append(("relative to the original", f"{results['ratio_start']:.3f}", f"{results['ratio']:.3f}"))
    header = ("measured", "before training", "now")
    return model_card(f"{config['model']}, recovered", summary, header, rows, "recovery.json", fields, record)
