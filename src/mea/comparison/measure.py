"""Measure one model of a comparison: quality, cache bytes, a sample of text and decoding time, as a record."""

import copy
from statistics import median
from typing import Any

import torch

from mea.comparison.configs import CacheConfig
from mea.comparison.protocol import ORIGINAL, Protocol
from mea.comparison.quality import Quality
from mea.compression.result import Compressed
from mea.evaluate.generation import continue_prompt
from mea.evaluate.speed import cache_size, decode_seconds, speed_ratio, use_packed_decode
from mea.models.accounting import cached_share
from mea.models.fold import stock_form
from mea.records import Progress, Record, make_record


class Measurement:
    """Measures models next to the uncompressed one, which is measured first."""

    def __init__(self, model: Any, tokenizer: Any, protocol: Protocol, progress: Progress | None = None):
        self.model, self.tokenizer, self.protocol, self.progress = model, tokenizer, protocol, progress
        self.quality = Quality(tokenizer, protocol, progress)
        self.scored_original = in_dtype(model, protocol.dtype)
        self._decoded: dict[tuple, tuple[dict[str, list[float]], dict[str, Any]]] = {}

    def record(
        self, label: str, result: Compressed | None, settings: dict[str, Any], cache: CacheConfig | None = None
    ) -> Record:
        """Measure one model, the original where `result` is None, over an ordinary cache where `cache` is None."""
        protocol = self.protocol
        model = self.scored_original if result is None else in_dtype(result.model, protocol.dtype)
        # Whole heads rotate as one, so that no position is special.
        by_position = cache is None and not (result is not None and result.plan.method.whole_heads)
        results, samples = self.quality.measure(label, model, cache, by_position=by_position)
        length = min(protocol.cache_tokens, model.config.get_text_config().max_position_embeddings)
        size = cache_size(model, length, cache.make if cache else None)
        results["cache"] = {"bytes_per_token": size.bytes_per_token, "tokens": length}
        if protocol.prompt and cache is None:
            text = continue_prompt(model, self.tokenizer, protocol.prompt, max_new_tokens=protocol.new_tokens)
            results["continuation"] = {"prompt": protocol.prompt, "text": text}
        if result is not None:
            results |= {
                "compress_seconds": result.seconds,
                "self_check": result.self_check,
                "layers": {
                    "what": "expected loss, nats per token" if result.plan.method.coded else "relative output error",
                    "values": result.layers,
                },
            }
        if protocol.decode_steps and not (result is None and cache is None):
            samples["decode_seconds"], results["decode"] = self._decoding(result, cache)
        seeds = {"calibration": result.plan.calibration.seed if result else 0}
        config = settings | {"label": label} | _described(result, cache)
        return make_record("comparison", config, results=results, samples=samples, seeds=seeds)

    def _decoding(
        self, result: Compressed | None, cache: CacheConfig | None
    ) -> tuple[dict[str, list[float]], dict[str, Any]]:
        """Seconds of all steps and their summary, measured once for all models that decode alike."""
        key: tuple[Any, ...] = (cache,)
        if result:
            method = result.plan.method
            key = (result.plan.layout, method.name if method.coded else method.form.name, cache)
        if key not in self._decoded:  # all that speed depends on
            self._decoded[key] = self._decode(result.model if result else self.model, cache)
        return self._decoded[key]

    def _decode(self, model: Any, cache: CacheConfig | None) -> tuple[dict[str, list[float]], dict[str, Any]]:
        protocol = self.protocol
        dtype = getattr(torch, protocol.decode_dtype)
        original = copy.deepcopy(self.model).to(dtype)
        if cached_share(original.config) == 1:  # a model that caches components is fastest as it is
            original = use_packed_decode(stock_form(original))
        pair = {ORIGINAL: original, "compressed": copy.deepcopy(model).to(dtype)}
        caches = {"compressed": cache.make} if cache else {}
        context, steps = protocol.decode_context, protocol.decode_steps
        seconds = decode_seconds(pair, context, steps, caches=caches, progress=self.progress)
        middle, low, high = speed_ratio(seconds["compressed"], seconds[ORIGINAL])
        return seconds, {
            "context": context, "dtype": protocol.decode_dtype, "batch": 1, "seconds": median(seconds["compressed"]),
            "ratio": middle, "ratio_low": low, "ratio_high": high,
        }  # fmt: skip


def in_dtype(model: Any, dtype: str) -> Any:
    """The model, or a copy of it, in a dtype."""
    resolved = getattr(torch, dtype)
    return model if model.dtype == resolved else copy.deepcopy(model).to(resolved)


def _described(result: Compressed | None, cache: CacheConfig | None) -> dict[str, Any]:
    """The method, its settings and its cache, for a record."""
    config: dict[str, Any] = {"method": "none" if cache is None else "quantised", "keep": 1.0}
    if result is not None:
        config |= {**result.plan.describe(), **result.plan.layout.described()}
    if cache is not None:
        config |= {"bits": cache.bits, "backend": cache.backend or "mea"}
    return config
