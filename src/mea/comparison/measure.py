"""What is measured of every model of a comparison, and how it becomes a record."""

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mea.comparison.peers import PeerResult, run_peer
from mea.compression.api import Compressed
from mea.evaluate.generation import continue_prompt
from mea.evaluate.perplexity import Estimate, block_means, by_position, perplexity, ratio, text_losses
from mea.evaluate.speed import MakeCache, cache_size, decode_seconds, speed_ratio, use_packed_decode
from mea.evaluate.through_cache import Continuation, ThroughCache
from mea.models.accounting import cached_share
from mea.models.fold import stock_form
from mea.models.quantized_cache import CacheFormat, QuantisedCache
from mea.ops.precision import named_dtype
from mea.records import Progress, Record, make_record
from mea.text import encode_text, load_text, start_token, windows

ORIGINAL = "uncompressed"
SHORT = 256  # tokens of the cache that is measured, where no continuation says how many there are


@dataclass(frozen=True)
class Protocol:
    """What is measured of every model of a comparison.

    Attributes
    ----------
    texts
        ``(name, tokens)``; the first is the main one.
    window
        For the texts.
    position_text, positions
        One pass of the last position's length, and the edges of the ranges it is reported by; none without positions.
    prompt, new_tokens
        Continued greedily; not without a prompt.
    decode_context, decode_steps
        For the time of a decoding step, in `decode_dtype` (``"fast"``: bfloat16 where this machine multiplies it, else
        float32); not without steps.
    context
        Of each window, what is read before the continuation that is scored; no continuations if 0. Bytes are then
        those of the cache after such a context.
    dtype
        To score in, and of the cache that is measured.
    """

    texts: tuple[tuple[str, int], ...] = (("wikitext-2-test", 20480), ("technical", 4096))
    window: int = 1024
    position_text: str = "wikitext-2-test"
    positions: tuple[int, ...] = (0, 1024, 2048, 4096, 8192)
    prompt: str = "The lighthouse keeper had not spoken to anyone for a month when"
    new_tokens: int = 48
    decode_context: int = 8000
    decode_steps: int = 24
    decode_dtype: str = "fast"
    context: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("decode_dtype", "dtype"):
            object.__setattr__(self, name, named_dtype(getattr(self, name)))


@dataclass(frozen=True)
class CacheConfig:
    """How a cache is stored: in few bits, by this package or by one of transformers' backends."""

    bits: int
    backend: str = ""

    @property
    def block(self) -> tuple[int, int]:
        """Tokens that are closed at once, and how many more the first block has."""
        form = CacheFormat()
        return (form.block, 0) if self.backend else (form.block, form.first)

    def absent(self, config: Any) -> str:
        """Why no such cache can be made here; nothing if it can."""
        try:
            self.make(config)
        except (ImportError, ValueError) as error:
            return " ".join(str(error).split())[:200]
        return ""

    def make(self, config: Any) -> Any:
        """An empty cache."""
        if not self.backend:
            return QuantisedCache(config, self.bits)
        from transformers import QuantizedCache

        # Groups and exact window as in this package's own; the axes are those that each backend has for tokens.
        axis = 1 if self.backend.lower() == "hqq" else 0
        return QuantizedCache(
            self.backend, config, nbits=self.bits, q_group_size=32, residual_length=self.block[0],
            axis_key=axis, axis_value=axis,
        )  # fmt: skip


class Measuring:
    """The uncompressed model's losses, to which those of the others are compared."""

    def __init__(self, model: Any, tokenizer: Any, protocol: Protocol, progress: Progress | None):
        self.model, self.tokenizer, self.protocol, self.progress = model, tokenizer, protocol, progress
        self.plain: Any = None
        self.reference: dict[str, Tensor] = {}
        self.decoded: dict[tuple, tuple[dict[str, list[float]], dict[str, Any]]] = {}

    def record(
        self, label: str, result: Compressed | None, settings: dict[str, Any], stored: CacheConfig | None = None
    ) -> Record:
        """Measure one model, the original where `result` is None, with an ordinary cache or one in few bits."""
        plain = result is None and stored is None
        model = self._scored(None if result is None else result.model)
        samples: dict[str, Any] = {}
        results: dict[str, Any] = {"texts": {}, "position_text": self.protocol.position_text}
        for text, count in self.protocol.texts:
            read = None if stored is None else ThroughCache(stored.make, *stored.block)
            losses = self._losses(label, model, text, count, self.protocol.window, read)
            results["texts"][text] = self._text(text, losses, plain)
            samples[f"loss_{text}"] = block_means(losses)
        if self.protocol.context:
            results["continuations"] = {}
            for text, count in self.protocol.texts:
                read = Continuation(self.protocol.context, stored.make if stored else None)
                losses = self._losses(f"{label}, continued", model, text, count, self.protocol.window, read)
                results["continuations"][text] = self._continued(text, losses, plain)
                samples[f"continued_{text}"] = block_means(losses)
        whole = result is not None and result.plan.method.whole_heads  # they rotate as one: no position is special
        if self.protocol.positions and not whole and stored is None:
            length = self.protocol.positions[-1]
            losses = self._losses(label, model, self.protocol.position_text, length, length)
            results["positions"] = self._positions(losses, result)
            samples["loss_by_position"] = block_means(losses)
        length = self.protocol.context or SHORT
        size = cache_size(model, length, stored.make if stored else None).bytes_per_token
        results["cache"] = {"bytes_per_token": size, "tokens": length}
        if self.protocol.prompt and stored is None:
            prompt, count = self.protocol.prompt, self.protocol.new_tokens
            text = continue_prompt(model, self.tokenizer, prompt, max_new_tokens=count)
            results["continuation"] = {"prompt": prompt, "text": text}
        config = dict(settings, label=label, method="none", keep=1.0)
        if result is not None:
            config |= {**result.plan.describe(), "ranks": result.plan.layout.ranks}
            results |= {
                "compress_seconds": result.seconds,
                "self_check": result.self_check,
                "layers": {"what": "relative output error", "values": result.relative_output_errors},
            }
        if stored is not None:
            config |= {"bits": stored.bits, "backend": stored.backend or "mea"}
            config["method"] = "few bits" if result is None else config["method"]
        if self.protocol.decode_steps and not plain:
            key = (result.plan.layout.ranks, result.plan.method.form.name, stored) if result else (stored,)
            if key not in self.decoded:  # all that speed depends on
                self.decoded[key] = self._decode(result.model if result else self.model, stored)
            samples["decode_seconds"], results["decode"] = self.decoded[key]
        seed = result.plan.calibration.seed if result else 0
        return make_record("comparison", config, results=results, samples=samples, seeds={"calibration": seed})

    def peers(
        self,
        peer: str,
        python: str | None,
        runs: Sequence[dict[str, Any]],
        settings: dict[str, Any],
        calibration: Int[Tensor, "n t"],
    ) -> list[Record]:
        """Records of a peer's methods, scored on continuations; `runs` have ``label``, ``name`` and ``ratio``.

        `calibration` holds the windows that this package's methods are fitted on.
        """
        scored: dict[str, list[PeerResult]] = {}
        texts = self.tokenizer.batch_decode(calibration)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            if python is not None:
                self._scored(None).save_pretrained(folder / "model")
                self.tokenizer.save_pretrained(folder / "model")
            for text, count in self.protocol.texts:
                tokens = encode_text(self.tokenizer, load_text(text), count)
                rows = windows(tokens, self.protocol.window, start_token(self.tokenizer))
                scored[text] = run_peer(
                    peer, python, folder / text, folder / "model", rows, list(runs), context=self.protocol.context,
                    dtype=self.protocol.dtype, calibration=texts,
                    calibration_window=calibration.shape[1],
                )  # fmt: skip
        return [self._peer(peer, run, {text: found[i] for text, found in scored.items()}, settings)
                for i, run in enumerate(runs)]  # fmt: skip

    def _peer(self, peer: str, run: dict[str, Any], found: dict[str, PeerResult], settings: dict[str, Any]) -> Record:
        config = dict(settings, label=run["label"], method=f"{peer} {run['name']}", keep=1 - run["ratio"])
        first = next(iter(found.values()))
        failed = next((each.error for each in found.values() if each.losses is None), None)
        if failed is not None:
            return make_record("comparison", config, results={"not_run": failed})
        config["peer_versions"] = first.versions
        continued = {
            text: self._continued(text, each.losses, False) for text, each in found.items() if each.losses is not None
        }
        cache = {"bytes_per_token": first.bytes_per_token, "tokens": self.protocol.context}
        samples = {
            f"continued_{text}": block_means(each.losses) for text, each in found.items() if each.losses is not None
        }
        return make_record("comparison", config, results={"continuations": continued, "cache": cache}, samples=samples)

    def _scored(self, model: Any) -> Any:
        """The model, the original if None, in the dtype to score in."""
        dtype = getattr(torch, self.protocol.dtype)
        if model is not None:
            return model if model.dtype == dtype else copy.deepcopy(model).to(dtype)
        if self.plain is None:
            self.plain = self.model if self.model.dtype == dtype else copy.deepcopy(self.model).to(dtype)
        return self.plain

    def _losses(self, label: str, model: Any, text: str, count: int, window: int, read: Any = None) -> Tensor:
        tokens = encode_text(self.tokenizer, load_text(text), count)
        losses = text_losses(
            model, self.tokenizer, tokens, window, what=f"{label}: {text}", read=read, progress=self.progress
        )
        self.reference.setdefault(f"{text} {window} {losses.shape[1]}", losses)
        return losses

    def _text(self, text: str, losses: Tensor, plain: bool) -> dict[str, Any]:
        window = self.protocol.window
        values = {**_estimate("perplexity", perplexity(losses)), "window": window, "tokens": losses.numel()}
        if not plain:
            values |= _estimate("ratio", ratio(losses, self.reference[f"{text} {window} {losses.shape[1]}"]))
        return values

    def _continued(self, text: str, losses: Tensor, plain: bool) -> dict[str, Any]:
        return self._text(text, losses, plain) | {"context": self.protocol.context}

    def _positions(self, losses: Tensor, result: Compressed | None) -> list[dict[str, Any]]:
        edges = self.protocol.positions
        reference = self.reference[f"{self.protocol.position_text} {edges[-1]} {losses.shape[1]}"]
        ranges = []
        for own, relative in zip(by_position(losses, edges), by_position(losses, edges, reference), strict=True):
            values = {"start": own.start, "stop": own.stop, **_estimate("perplexity", own.estimate)}
            ranges.append(values if result is None else values | _estimate("ratio", relative.estimate))
        return ranges

    def _decode(self, model: Any, stored: CacheConfig | None) -> tuple[dict[str, list[float]], dict[str, Any]]:
        protocol = self.protocol
        dtype = getattr(torch, protocol.decode_dtype)
        original = copy.deepcopy(self.model).to(dtype)
        if cached_share(original.config) == 1:  # a model that caches components is fastest as it is
            original = use_packed_decode(stock_form(original))
        pair = {ORIGINAL: original, "compressed": copy.deepcopy(model).to(dtype)}
        caches: dict[str, MakeCache] = {"compressed": stored.make} if stored else {}
        seconds = decode_seconds(
            pair, protocol.decode_context, protocol.decode_steps, caches=caches, progress=self.progress
        )
        middle, low, high = speed_ratio(seconds["compressed"], seconds[ORIGINAL])
        return seconds, {
            "context": protocol.decode_context, "dtype": str(dtype).removeprefix("torch."), "batch": 1,
            "seconds": median(seconds["compressed"]), "ratio": middle, "ratio_low": low, "ratio_high": high,
        }  # fmt: skip


def _estimate(name: str, estimate: Estimate) -> dict[str, float]:
    error = "standard_error" if name == "perplexity" else f"{name}_standard_error"
    return {name: estimate.value, error: estimate.standard_error}
