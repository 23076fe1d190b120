"""Methods side by side on one model, this package's and others': quality, cache bytes, decoding time.

Every model becomes one record of the kind ``"comparison"`` in a folder (`mea.report.sections.comparison_rows` lists its
fields); a record that is already there for the same settings is not made again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mea.comparison.configs import MethodConfig
from mea.comparison.measure import Measurement
from mea.comparison.peers.records import peer_records
from mea.comparison.protocol import ORIGINAL, Protocol
from mea.comparison.training import Training
from mea.compression.api import run_plans
from mea.compression.budget import CacheShape
from mea.compression.calibrate.layerwise import LayerWalk
from mea.compression.calibrate.text import Calibration, calibration_tokens
from mea.compression.convert import checked_stock_form
from mea.compression.cost import estimate, reading_seconds
from mea.compression.options import CompressOptions
from mea.compression.plan import Plan, make_plan
from mea.compression.result import Compressed
from mea.evaluate.runner import existing_record
from mea.models.fold import stock_config
from mea.models.loading import check_supported, load, load_config
from mea.records import Progress, Record, make_record, read_record, write_record

TRAINING = 4  # times that reading the tokens takes: forth and back (twice as much), and the original
AT_ONCE = 4  # plans that are carried out in one pass over the layers, whose results are in memory together


def compare(
    source: str,
    folder: Path,
    configs: list[MethodConfig],
    *,
    protocol: Protocol | None = None,
    calibration: Calibration | None = None,
    peers: Mapping[str, str] | None = None,
    training: Training | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Measure a model and all ways to compress it; returns the records, the uncompressed model's first.

    Every record is written at once, so that an interrupted run continues.

    Parameters
    ----------
    peers
        Package -> Python of the environment that it is installed in. The record of a missing peer says so.
    training
        Training of the configs that are recovered.

    Raises
    ------
    ValueError
        As `mea.compression.api.compress`; or two configs have one label; or there is no training for those that
        are to be recovered, or nothing that it could train.
    """
    protocol, calibration = protocol or Protocol(), calibration or Calibration()
    _check(configs, protocol, training)
    settings = {"protocol": asdict(protocol), "model": Path(source).name}
    files = {ORIGINAL: _RecordFile(folder, ORIGINAL, settings)}
    for config in configs:
        own = {"calibration": asdict(calibration)} if config.calibrated else {}
        if training and config.recovered:
            own["recovery"] = training.description
        files[config.label] = _RecordFile(folder, config.label, settings | own, config.series)
    missing = [config for config in configs if not files[config.label].exists]
    _plans(load_config(source), missing, calibration, protocol)  # refuses what cannot be before any work
    if missing or not files[ORIGINAL].exists:
        model, tokenizer = load(source, "float32", whole=True, progress=progress)
        measurement = Measurement(model, tokenizer, protocol, progress)
        _Run(files, measurement, calibration, training, peers or {}, progress)(missing)
    return [read_record(file.path) for file in files.values()]


def _check(configs: Sequence[MethodConfig], protocol: Protocol, training: Training | None) -> None:
    """Refuse configs that cannot be measured; raises ValueError."""
    for config in configs:
        if config.method != "none" and config.bits is not None:
            raise ValueError(f"{config.label}: {config.method} compresses the cache; give bits without a method")
    labels = [ORIGINAL, *(config.label for config in configs)]
    if len({_slug(label) for label in labels}) < len(labels):
        raise ValueError(f"configs need labels of their own, not {', '.join(labels)}")
    for config in configs:
        if config.recovered and (training is None or config.options is None):
            reason = "no training is given" if config.options else "it has no factors to train"
            raise ValueError(f"{config.label}: {reason}")
    if any(config.peer for config in configs) and not protocol.context:
        raise ValueError("other packages are scored on continuations only: give a context above 0")


@dataclass(frozen=True)
class _RecordFile:
    """Where a record stands, and what its configuration has to say for it not to be made again."""

    folder: Path
    label: str
    settings: dict[str, Any]
    series: str = ""

    @property
    def path(self) -> Path:
        return self.folder / f"{_slug(self.label)}.json"

    @property
    def exists(self) -> bool:
        record = existing_record(self.path, "comparison", self.settings)
        return record is not None and "not_run" not in record["results"]  # what could not run is tried again

    def write(self, record: Record) -> None:
        if self.series:
            record["config"]["series"] = self.series
        write_record(self.path, record)


@dataclass(frozen=True)
class _Run:
    """Measures configs, and writes every record as soon as it is there."""

    files: Mapping[str, _RecordFile]
    measurement: Measurement
    calibration: Calibration
    training: Training | None
    peers: Mapping[str, str]
    progress: Progress | None

    def __call__(self, configs: Sequence[MethodConfig]) -> None:
        """The original, what needs no fit, the peers, and last what is fitted."""
        original = self.files[ORIGINAL]
        original.write(self.measurement.record(ORIGINAL, None, original.settings))
        for config in configs:
            if config.options is None and not config.peer:
                self._unfitted(config)
        tokens = calibration_tokens(self.measurement.tokenizer, self.calibration)
        for peer in dict.fromkeys(config.peer for config in configs if config.peer):
            self._peer(peer, [config for config in configs if config.peer == peer], tokens)
        self._fitted(configs, tokens)

    def _measure(self, config: MethodConfig, result: Compressed | None = None) -> None:
        file = self.files[config.label]
        file.write(self.measurement.record(config.label, result, file.settings, config.cache))

    def _unfitted(self, config: MethodConfig) -> None:
        absent = config.cache.absent(self.measurement.model.config) if config.cache else ""
        if not absent:
            self._measure(config)
            return
        file = self.files[config.label]
        described = file.settings | {"label": config.label, "method": config.backend, "keep": config.keep}
        file.write(make_record("comparison", described, results={"not_run": absent}))

    def _peer(self, peer: str, configs: Sequence[MethodConfig], tokens: Int[Tensor, "n t"]) -> None:
        settings, measurement = self.files[configs[0].label].settings, self.measurement
        python, model = self.peers.get(peer), measurement.scored_original
        records = peer_records(peer, python, configs, model, measurement.quality, settings, tokens)
        for config, record in zip(configs, records, strict=True):
            self.files[config.label].write(record)

    def _fitted(self, configs: Sequence[MethodConfig], tokens: Int[Tensor, "n t"]) -> None:
        model = self.measurement.model
        plans = _plans(model.config, configs, self.calibration, self.measurement.protocol)
        if not plans:
            return
        walk, keys = LayerWalk(checked_stock_form(model, tokens), tokens.shape[1]), list(plans)
        coded = [key for key in keys if plans[key].method.coded]  # these share all weights, and one calibration
        ranked = [key for key in keys if key not in coded]
        for some in [coded, *(ranked[start : start + AT_ONCE] for start in range(0, len(ranked), AT_ONCE))]:
            results = run_plans(walk, tokens, [plans[key] for key in some], progress=self.progress)
            for key, result in zip(some, results, strict=True):
                same = [config for config in configs if config.options == key]
                for config in same:
                    if not config.recovered:
                        self._measure(config, result)
                self._recovered([config for config in same if config.recovered], result)

    def _recovered(self, configs: Sequence[MethodConfig], result: Compressed) -> None:
        """Measure what one training makes of a fitted model."""
        if not configs or self.training is None:
            return
        trained = self.training.run(result.model, self.measurement.model, _slug(configs[0].label))
        for config in configs:
            self._measure(config, replace(result, model=trained))


def describe_cost(
    source: str,
    configs: list[MethodConfig],
    protocol: Protocol | None = None,
    calibration: Calibration | None = None,
    trained_tokens: int = 0,
) -> str:
    """Cost of a comparison on this machine, without the peers; no weights are read.

    `trained_tokens` is what each recovered configuration is trained on.

    Raises
    ------
    ValueError
        As `compare`.
    """
    protocol = protocol or Protocol()
    config = stock_config(load_config(source))
    plans = _plans(config, configs, calibration or Calibration(), protocol).values()
    shape = CacheShape.of(config, 4)
    read = protocol.positions[-1] if protocol.positions else 0
    seconds = (
        reading_seconds(config, shape, sum(tokens for _, tokens in protocol.texts), protocol.window)
        + reading_seconds(config, shape, read, read)
        + (reading_seconds(config, shape, 2 * protocol.decode_context, protocol.decode_context)
           if protocol.decode_steps else 0.0)
    )  # fmt: skip
    training = TRAINING * reading_seconds(config, shape, trained_tokens, protocol.window)
    total = (1 + len(configs)) * seconds + training * sum(method_config.recovered for method_config in configs)
    total += sum(estimate(config, plan).seconds for plan in plans)
    minutes, plural = max(1, round(total / 60)), "s" * (len(configs) != 1)
    return (
        f"{len(configs)} way{plural} to make the cache of {Path(source).name} smaller: about {minutes} minutes on "
        "this machine if it is quiet. Each is recorded when it is done, and an interrupted run resumes."
    )


def possible(
    source: str, configs: Sequence[MethodConfig], calibration: Calibration, protocol: Protocol
) -> tuple[list[MethodConfig], dict[str, str]]:
    """The configs that are possible for a model, and labels and reasons of the others; no weights are read.

    Raises
    ------
    ValueError
        There is no such model, or it cannot be compressed at all.
    """
    model, reasons = load_config(source), {}
    check_supported(stock_config(model))
    for config in configs:
        try:
            _plans(model, [config], calibration, protocol)
        except ValueError as error:
            reasons[config.label] = str(error)
    return [config for config in configs if config.label not in reasons], reasons


def _plans(
    config: Any, configs: Sequence[MethodConfig], calibration: Calibration, protocol: Protocol
) -> dict[CompressOptions, Plan]:
    """One plan for all configs that differ only in what is done after the fit."""
    itemsize = getattr(torch, protocol.dtype).itemsize  # of the cache that is measured
    fits = dict.fromkeys(method_config.options for method_config in configs if method_config.options is not None)
    return {options: make_plan(config, itemsize, replace(options, calibration=calibration)) for options in fits}


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in label)
