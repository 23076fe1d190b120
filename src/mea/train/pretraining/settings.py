"""What a pretraining run is: validated, frozen, read from a TOML file that holds only what differs from defaults."""

import dataclasses
import difflib
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mea.models.config import MeaConfig
from mea.models.presets import preset

Schedule = Literal["constant", "linear", "cosine", "wsd"]
Precision = Literal["float32", "bfloat16"]
Frozen = Literal["no", "identity", "random"]


@dataclass(frozen=True)
class ModelSettings:
    """Which model: a preset and a variant of `mea.models.presets`, with changes.

    Parameters
    ----------
    preset, variant
        Keys of `mea.models.presets.SHAPES` and `VARIANTS`.
    changes
        Other fields of `MeaConfig`; variants still match each other in parameters.
    attention_options
        Options of the attention class in addition to the variant's: ``{"qk_norm": true}``.
    freeze_mixing
        Keep the mixing matrices as they are: ``"identity"``, or ``"random"`` (orthogonal).
    """

    preset: str = "1m"
    variant: str = "mea"
    changes: dict[str, Any] = field(default_factory=dict)
    attention_options: dict[str, Any] = field(default_factory=dict)
    freeze_mixing: Frozen = "no"

    def __post_init__(self) -> None:
        preset(self.preset, self.variant)

    def config(self, vocabulary: int, end: int, positions: int) -> MeaConfig:
        """The model's configuration for a tokenizer of `vocabulary` tokens and rows of `positions` tokens."""
        changes = {"max_position_embeddings": positions, **self.changes}
        special = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": end}
        config = preset(self.preset, self.variant, **changes, **special)
        init = {"identity": "identity", "random": "orthogonal"}.get(self.freeze_mixing)
        options = {"init": init} if init else {}
        config.attention_options = {**(config.attention_options or {}), **options, **self.attention_options}
        return config


@dataclass(frozen=True)
class DataSettings:
    """Where the text is, and how it becomes rows of tokens.

    Parameters
    ----------
    files
        Files or folders: ``.txt`` or ``.md``, JSON lines or Parquet, also compressed. Or else:
    hub, hub_config, hub_split
        A data set of the Hugging Face hub, streamed.
    kind
        Which files of a folder are taken: ``"text"``, ``"json"`` or ``"parquet"``.
    column
        Where the text is in JSON, Parquet and hub data.
    separator
        Between the documents of a text file; without one each file is a document.
    tokenizer
        A folder or hub id; None trains a byte-level BPE of `vocabulary` tokens on the first `tokenizer_characters` of
        the training documents.
    validation_fraction
        Of the documents, chosen by a hash of their text; never trained on.
    validation_tokens
        How many of their tokens are scored, spread evenly over the split.
    row
        Tokens of a row, the model's context.
    shard_tokens
        Tokens of a shard at least (it ends with a document).
    """

    files: tuple[str, ...] = ()
    hub: str | None = None
    hub_config: str | None = None
    hub_split: str = "train"
    kind: Literal["text", "json", "parquet"] = "text"
    column: str = "text"
    separator: str | None = None
    tokenizer: str | None = None
    vocabulary: int = 2048
    tokenizer_characters: int = 20_000_000
    validation_fraction: float = 0.02
    validation_tokens: int = 65_536
    row: int = 256
    shard_tokens: int = 1 << 26

    def __post_init__(self) -> None:
        if bool(self.files) == (self.hub is not None):
            raise ValueError("data: give either files or hub")
        if self.vocabulary < 257:
            raise ValueError(
                f"data.vocabulary must hold the 256 bytes and an end mark, 257 at least: {self.vocabulary}"
            )
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"data.validation_fraction must lie between 0 and 1: {self.validation_fraction}")
        for name in ("validation_tokens", "tokenizer_characters", "shard_tokens"):
            _positive(f"data.{name}", getattr(self, name))
        if self.row < 2:
            raise ValueError(f"data.row must be 2 at least: {self.row}")


@dataclass(frozen=True)
class OptimSettings:
    """AdamW and its schedule. Amounts of training are given in tokens.

    Parameters
    ----------
    learning_rate
        The peak.
    mixer_multiplier
        Of the learning rate, for mixing matrices.
    weight_decay
        On matrices; none on mixing matrices, gains and other vectors.
    schedule
        ``"constant"``, ``"linear"``, ``"cosine"`` or ``"wsd"`` (warm-up, stable, decay), after a linear warm-up from
        nothing (from `final_fraction` in wsd).
    final_fraction
        Of the peak, where cosine and wsd end.
    decay_fraction
        Of the steps, in which wsd decays.
    clip
        Largest norm of the gradient; 0 for no clipping.
    """

    learning_rate: float = 3e-3
    mixer_multiplier: float = 1.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    schedule: Schedule = "constant"
    warmup_tokens: int = 0
    final_fraction: float = 0.1
    decay_fraction: float = 0.2
    clip: float = 1.0
    tokens: int = 3_000_000
    batch_tokens: int = 2048

    def __post_init__(self) -> None:
        for name in ("learning_rate", "tokens", "batch_tokens", "mixer_multiplier"):
            _positive(f"optim.{name}", getattr(self, name))
        for name in ("weight_decay", "warmup_tokens", "clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"optim.{name} must not be negative: {getattr(self, name)}")
        for name in ("final_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optim.{name} must lie between 0 and 1: {getattr(self, name)}")
        if self.tokens < self.batch_tokens:
            raise ValueError(f"optim.tokens {self.tokens} are fewer than one batch of {self.batch_tokens}")

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.tokens // self.batch_tokens

    @property
    def warmup_steps(self) -> int:
        """Steps over which the rate rises."""
        return self.warmup_tokens // self.batch_tokens


@dataclass(frozen=True)
class RunSettings:
    """How a run is carried out and watched.

    Parameters
    ----------
    seed
        Of weights and data order.
    micro_batch_rows
        Rows that one process takes at a time; None for the whole batch. Less is made up by gradient accumulation.
    precision
        ``"bfloat16"`` is autocast over fp32 weights.
    validations
        How often validation loss is taken, evenly spread, the last at the end.
    checkpoints
        How often the state is saved.
    report_to
        Hugging Face Trainer's reporters: ``["tensorboard"]``.
    shard
        FSDP2: parameters, gradients and moments are shared out among the processes that torchrun starts, instead of
        each having all.
    fold_at
        Fraction of the steps after which mixing is folded into the projections and stays the identity.
    divergence
        A run whose mean loss over `DIVERGENCE_WINDOW` steps is this far above that of a uniform guess has diverged.
    """

    seed: int = 0
    micro_batch_rows: int | None = None
    precision: Precision = "float32"
    compile: bool = False
    validations: int = 10
    checkpoints: int = 4
    log_every: int = 1
    report_to: tuple[str, ...] = ()
    shard: bool = False
    fold_at: float | None = None
    divergence: float = 0.5

    def __post_init__(self) -> None:
        for name in ("validations", "checkpoints", "log_every"):
            _positive(f"run.{name}", getattr(self, name))
        if self.shard and self.fold_at is not None:
            raise ValueError("run.fold_at changes whole matrices: it does not go with run.shard")
        if self.fold_at is not None and not 0 < self.fold_at < 1:
            raise ValueError(f"run.fold_at is a fraction of the run, between 0 and 1: {self.fold_at}")


@dataclass(frozen=True)
class PretrainSettings:
    """All of a run; `labels` (``arm``, ``mixing``, ``norm``) go into its record as they are, for tables and effects."""

    data: DataSettings
    model: ModelSettings = field(default_factory=ModelSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    run: RunSettings = field(default_factory=RunSettings)
    labels: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.optim.batch_tokens % self.data.row:
            raise ValueError(
                f"optim.batch_tokens ({self.optim.batch_tokens}) must be a multiple of data.row ({self.data.row})"
            )

    @property
    def rows_per_batch(self) -> int:
        """Rows of one optimiser step, over all processes."""
        return self.optim.batch_tokens // self.data.row


def read_settings(path: str | Path) -> PretrainSettings:
    """The settings in a TOML file.

    Raises
    ------
    ValueError
        Not TOML; a table or name that does not exist (the message names the nearest); a value out of range.
    """
    return settings_from(read_toml(path))


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file."""
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    return tables


def settings_from(tables: dict[str, Any]) -> PretrainSettings:
    """Settings from nested dicts, as TOML gives them; see `read_settings`."""
    return build(PretrainSettings, tables, "")


def build(cls: type, values: Any, where: str) -> Any:
    """An instance of a dataclass from a dict, dataclass fields from dicts of their own."""
    if not isinstance(values, dict):
        raise ValueError(f"[{where}] must be a table, not {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            place = f"[{where}] has" if where else "there is"
            raise ValueError(f"{place} no {name!r}; known are {', '.join(fields)}.{hint}")
    kinds = get_type_hints(cls)
    made = {
        name: _converted(kinds[name], value, f"{where}.{name}" if where else name) for name, value in values.items()
    }
    required = {name for name, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    if missing := required - set(made):
        raise ValueError(f"[{where or 'settings'}] lacks {', '.join(sorted(missing))}")
    return cls(**made)


def _converted(kind: Any, value: Any, where: str) -> Any:
    """A value of TOML as a field's type: tables become dataclasses, lists or a lone string tuples, integers floats."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return build(kind, value, where)
    choices = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    for choice in choices:
        plain = get_origin(choice) or choice
        if plain is Literal:
            _one_of(where, value, get_args(choice))
            return value
        if plain is tuple and isinstance(value, str | list | tuple):
            return (value,) if isinstance(value, str) else tuple(_converted(str, item, where) for item in value)
        if plain is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise ValueError(f"{where} is {value}")
            return float(value)
        if isinstance(value, plain) and (plain is bool or not isinstance(value, bool)):
            return value
    names = " or ".join(getattr(get_origin(choice) or choice, "__name__", str(choice)) for choice in choices)
    raise ValueError(f"{where} must be {names}, not {value!r}")


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}.{hint}")


def _positive(name: str, value: int | float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive: {value}")
