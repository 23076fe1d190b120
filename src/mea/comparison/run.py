"""Methods side by side on one model, this package's and others': quality, cache bytes, decoding time.

Every model becomes one record of the kind ``"comparison"`` in a folder (`mea.report.sections.comparison_rows` lists its
fields); a record that is already there for the same settings is not made again.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from mea.comparison.configs import MethodConfig
from mea.comparison.measure import ORIGINAL, Measuring, Protocol
from mea.compression.allocate.search import allocated
from mea.compression.api import Compressed, run_plans
from mea.compression.budget import CacheShape
from mea.compression.calibrate.layerwise import LayerWalk
from mea.compression.calibrate.text import Calibration, calibration_tokens
from mea.compression.check import checked_stock_form
from mea.compression.cost import estimate, reading_seconds
from mea.compression.plan import CompressOptions, Plan, make_plan
from mea.models.fold import stock_config
from mea.models.loading import load, load_config
from mea.records import Progress, Record, make_record, read_record, write_record

TRAINING = 4  # times that reading the tokens takes: forth and back (twice as much), and the original
AT_ONCE = 4  # plans that are carried out in one pass over the layers, whose results are in memory together


class Training(NamedTuple):
    """What configs that are `MethodConfig.recovered` go through.

    Attributes
    ----------
    run
        Takes the compressed model, the original and a name for its files; gives a trained copy.
    description
        For the records.
    """

    run: Callable[[Any, Any, str], Any]
    description: dict[str, Any]


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

    Every record is written as soon as it is there, so that an interrupted run goes on.

    Parameters
    ----------
    peers
        Package -> Python of the environment that it is installed in. The records of a peer that is not there say so.
    training
        Of configs that are recovered.

    Raises
    ------
    ValueError
        As `mea.compression.api.compress`; or two configs have one label; or there is no training for those that
        are to be recovered, or nothing that it could train.
    """
    protocol, calibration = protocol or Protocol(), calibration or Calibration()
    labels = [ORIGINAL, *(method_config.label for method_config in configs)]
    paths = {label: folder / (_slug(label) + ".json") for label in labels}
    if len(set(paths.values())) < len(labels):
        raise ValueError(f"configs need labels of their own, not {', '.join(labels)}")
    for each in configs:
        if each.recovered and (training is None or each.options is None):
            raise ValueError(
                f"{each.label}: {'no training is given' if each.options else 'it has no factors to train'}"
            )
    settings = {ORIGINAL: {"protocol": asdict(protocol), "model": Path(source).name}}
    for each in configs:
        settings[each.label] = settings[ORIGINAL] | ({"calibration": asdict(calibration)} if each.calibrated else {})
        if training and each.recovered:
            settings[each.label]["recovery"] = training.description
    done = {label: _reusable(path, settings[label]) for label, path in paths.items()}
    missing = [method_config for method_config in configs if not done[method_config.label]]
    if any(method_config.peer for method_config in configs) and not protocol.context:
        raise ValueError("peers are scored on continuations: give the protocol a context")
    _plans(load_config(source), missing, calibration)  # refuses what cannot be before any work
    if missing or not done[ORIGINAL]:
        _measure(source, missing, paths, settings, protocol, calibration, peers or {}, training, progress)
    return [read_record(path) for path in paths.values()]


def _measure(
    source: str,
    configs: list[MethodConfig],
    paths: dict[str, Path],
    settings: dict[str, dict[str, Any]],
    protocol: Protocol,
    calibration: Calibration,
    peers: Mapping[str, str],
    training: Training | None,
    progress: Progress | None,
) -> None:
    model, tokenizer = load(source, "float32")
    measuring = Measuring(model, tokenizer, protocol, progress)

    series = {method_config.label: method_config.series for method_config in configs if method_config.series}

    def keep(label: str, record: Record) -> None:
        if label in series:
            record["config"]["series"] = series[label]
        write_record(paths[label], record)

    def measure(method_config: MethodConfig, result: Compressed | None = None) -> None:
        label = method_config.label
        keep(label, measuring.record(label, result, settings[label], method_config.stored))

    keep(ORIGINAL, measuring.record(ORIGINAL, None, settings[ORIGINAL]))
    for method_config in configs:
        if method_config.options is None and not method_config.peer:
            absent = method_config.stored.absent(model.config) if method_config.stored else ""
            if absent:
                config = dict(
                    settings[method_config.label],
                    label=method_config.label,
                    method=method_config.backend,
                    keep=method_config.keep,
                )
                keep(method_config.label, make_record("comparison", config, results={"not_run": absent}))
                continue
            measure(method_config)
    tokens = calibration_tokens(tokenizer, calibration)
    for peer in dict.fromkeys(method_config.peer for method_config in configs if method_config.peer):
        runs = [
            {"label": each.label, "name": each.method.split()[1], "ratio": 1 - each.keep}
            for each in configs if each.peer == peer
        ]  # fmt: skip
        found = measuring.peers(peer, peers.get(peer), runs, settings[runs[0]["label"]], tokens)
        for run, record in zip(runs, found, strict=True):
            keep(run["label"], record)
    plans = _plans(model.config, configs, calibration)
    if not plans:
        return
    walk, keys = LayerWalk(checked_stock_form(model, tokens), tokens.shape[1]), list(plans)
    for start in range(0, len(keys), AT_ONCE):
        some = keys[start : start + AT_ONCE]
        chosen = [allocated(walk, tokenizer, tokens, plans[key], progress)[0] for key in some]
        for key, result in zip(some, run_plans(walk, tokens, chosen, progress=progress), strict=True):
            same = [each for each in configs if each.options == key]
            for method_config in (each for each in same if not each.recovered):
                measure(method_config, result)
            after = [each for each in same if each.recovered]
            if after and training:
                trained = replace(result, model=training.run(result.model, model, _slug(after[0].label)))
                for method_config in after:
                    measure(method_config, trained)


def describe_cost(
    source: str,
    configs: list[MethodConfig],
    protocol: Protocol | None = None,
    calibration: Calibration | None = None,
    trained_tokens: int = 0,
) -> str:
    """What a comparison takes here, without what peers need; no weights are read.

    `trained_tokens` is what each recovered configuration is trained on.

    Raises
    ------
    ValueError
        As `compare`.
    """
    protocol = protocol or Protocol()
    config = stock_config(load_config(source))
    plans = _plans(config, configs, calibration or Calibration()).values()
    shape = CacheShape.of(config, 4)
    read = protocol.positions[-1] if protocol.positions else 0
    seconds = (
        reading_seconds(config, shape, sum(tokens for _, tokens in protocol.texts), protocol.window)
        + reading_seconds(config, shape, read, read)
        + (reading_seconds(config, shape, 2 * protocol.decode_context, protocol.decode_context)
           if protocol.decode_steps else 0.0)
    )  # fmt: skip
    training = TRAINING * reading_seconds(config, shape, trained_tokens, protocol.window)
    total = (1 + len(configs)) * seconds + training * sum(each.recovered for each in configs)
    total += sum(estimate(config, plan).seconds for plan in plans)
    minutes, many = max(1, round(total / 60)), "s" * (len(configs) != 1)
    return (
        f"{len(configs)} way{many} to make the cache of {Path(source).name} smaller: about {minutes} minutes on "
        "this machine if it is quiet. Each is recorded as it is done; an interrupted run goes on."
    )


def _plans(config: Any, configs: list[MethodConfig], calibration: Calibration) -> dict[CompressOptions, Plan]:
    """One plan for all configs that differ in how their cache is stored only."""
    fits = dict.fromkeys(method_config.options for method_config in configs if method_config.options is not None)
    return {options: make_plan(config, 4, replace(options, calibration=calibration)) for options in fits}


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in label)


def _reusable(path: Path, settings: dict[str, Any]) -> Record | None:
    if not path.is_file():
        return None
    record = read_record(path)
    fresh = make_record("comparison", settings)["config"]  # as a record holds them
    same = {name: record["config"].get(name) for name in fresh} == fresh
    return record if same and "not_run" not in record["results"] else None  # what could not run is tried again
