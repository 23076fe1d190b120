"""Settings of a pretraining run: frozen, checked, read from a TOML file that holds only what differs from defaults."""

import tomllib
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr
from pydantic.dataclasses import dataclass

from mea.models.config import MeaConfig
from mea.models.decoder import MeaDecoderLayer
from mea.models.presets import preset
from mea.train.pretraining.recall import RecallSettings
from mea.train.settings import (
    CONFIG,
    Count,
    Fraction,
    Names,
    NotNegative,
    Positive,
    Seed,
    Share,
    Table,
    build,
)

Schedule = Literal["constant", "linear", "cosine", "wsd"]
Precision = Literal["float32", "bfloat16"]
Beta = Annotated[StrictFloat, Field(ge=0, lt=1)]
Frozen = Literal["no", "identity", "random"]

# Fields of a configuration that follow from the variant and the tokenizer: `changes` cannot change them.
SETTLED = {"attention", "attention_options", "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"}
TYPES = {
    int: Count,
    float: Positive,
    bool: StrictBool,
    str: StrictStr,
    int | None: Count,
    dict[str, Any] | None: Table,
}
ModelChanges = make_dataclass(
    "ModelChanges",
    [(name, TYPES[kind] | None, None) for name, kind in MeaConfig.__annotations__.items() if name not in SETTLED],
    namespace={"__pydantic_config__": CONFIG},
)


@dataclass(frozen=True, config=CONFIG)
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

    preset: StrictStr = "1m"
    variant: StrictStr = "mea"
    changes: Table = field(default_factory=dict)
    attention_options: Table = field(default_factory=dict)
    freeze_mixing: Frozen = "no"

    def __post_init__(self) -> None:
        build(ModelChanges, self.changes, "model.changes")
        preset(self.preset, self.variant)

    def config(self, vocabulary: int, end: int, positions: int) -> MeaConfig:
        """The model's configuration for a tokenizer of `vocabulary` tokens and rows of `positions` tokens."""
        changes: dict[str, Any] = {"max_position_embeddings": positions, **self.changes}
        special = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": end}
        config = preset(self.preset, self.variant, **changes, **special)
        init = {"identity": "identity", "random": "orthogonal"}.get(self.freeze_mixing)
        options = {"init": init} if init else {}
        config.attention_options = {**(config.attention_options or {}), **options, **self.attention_options}
        return config


@dataclass(frozen=True, config=CONFIG)
class DataSettings:
    """Where the text is, and how it becomes rows of tokens; or a task whose rows are drawn by a seed.

    Parameters
    ----------
    files
        Files or folders: ``.txt`` or ``.md``, JSON lines or Parquet, also compressed. Or else:
    hub, hub_config, hub_split
        A data set of the Hugging Face hub, streamed. Or else:
    recall
        A task of associative recall, which needs no text: of the other fields only `row` and `validation_tokens` hold.
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
        Fraction of the documents, chosen by a hash of their text, that is never trained on.
    validation_tokens
        Number of validation tokens that are scored, spread evenly over the split.
    row
        Tokens of a row, the model's context.
    shard_tokens
        Tokens of a shard at least (it ends with a document).
    """

    files: Names = ()
    hub: StrictStr | None = None
    hub_config: StrictStr | None = None
    hub_split: StrictStr = "train"
    recall: RecallSettings | None = None
    kind: Literal["text", "json", "parquet"] = "text"
    column: StrictStr = "text"
    separator: Annotated[StrictStr, Field(min_length=1)] | None = None
    tokenizer: StrictStr | None = None
    vocabulary: Annotated[StrictInt, Field(ge=257)] = 2048  # the 256 bytes and an end mark
    tokenizer_characters: Count = 20_000_000
    validation_fraction: Share = 0.02
    validation_tokens: Count = 65_536
    row: Annotated[StrictInt, Field(ge=2)] = 256
    shard_tokens: Count = 1 << 26

    def __post_init__(self) -> None:
        if bool(self.files) + (self.hub is not None) + (self.recall is not None) != 1:
            raise ValueError("data: give either files or hub or recall")
        if self.recall is not None:
            self._check_recall(self.recall)

    def _check_recall(self, task: RecallSettings) -> None:
        """Refuse fields of text, and rows that are too short."""
        used = ("recall", "row", "validation_tokens")
        unused = [f.name for f in fields(self) if f.name not in used and getattr(self, f.name) != f.default]
        if unused:
            raise ValueError(f"data.{unused[0]} is a setting of text, and data.recall has none")
        if self.row < task.longest:
            raise ValueError(f"data.row ({self.row}) must be at least {task.longest}, for the pairs and queries")

    @property
    def model_vocabulary(self) -> int:
        """Tokens of the model, as far as settings tell: a given tokenizer may have others."""
        return self.vocabulary if self.recall is None else self.recall.vocabulary


@dataclass(frozen=True, config=CONFIG)
class OptimSettings:
    """AdamW and its schedule. Amounts of training are given in tokens.

    Parameters
    ----------
    learning_rate
        The peak.
    mixer_multiplier
        Factor on the learning rate of mixing matrices.
    weight_decay
        On matrices; none on mixing matrices, gains and other vectors.
    schedule
        ``"constant"``, ``"linear"``, ``"cosine"`` or ``"wsd"`` (warm-up, stable, decay), after a linear warm-up from
        zero (from `final_fraction` in wsd).
    final_fraction
        Fraction of the peak at which cosine and wsd end.
    decay_fraction
        Fraction of the steps over which wsd decays.
    clip
        Largest norm of the gradient; 0 for no clipping.
    """

    learning_rate: Positive = 3e-3
    mixer_multiplier: Positive = 1.0
    weight_decay: NotNegative = 0.1
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    epsilon: NotNegative = 1e-8
    schedule: Schedule = "constant"
    warmup_tokens: Annotated[StrictInt, Field(ge=0)] = 0
    final_fraction: Fraction = 0.1
    decay_fraction: Fraction = 0.2
    clip: NotNegative = 1.0
    tokens: Count = 3_000_000
    batch_tokens: Count = 2048

    def __post_init__(self) -> None:
        if self.tokens < self.batch_tokens:
            raise ValueError(f"optim.tokens {self.tokens} are fewer than one batch of {self.batch_tokens}")
        if self.warmup_steps + self.decay_steps > self.steps:
            decay = f" and a decay of {self.decay_steps:,}" if self.decay_steps else ""
            raise ValueError(
                f"a warm-up of {self.warmup_steps:,} steps{decay} is longer than the run of {self.steps:,} steps: "
                "lower optim.warmup_tokens"
            )

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.tokens // self.batch_tokens

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises."""
        return self.warmup_tokens // self.batch_tokens

    @property
    def decay_steps(self) -> int:
        """Steps at the end over which wsd lowers the learning rate."""
        return max(1, round(self.decay_fraction * self.steps)) if self.schedule == "wsd" else 0


@dataclass(frozen=True, config=CONFIG)
class RunSettings:
    """How a run is carried out, logged and saved.

    Parameters
    ----------
    seed
        Seed of weights and data order.
    micro_batch_rows
        Rows per forward pass in one process; None for the whole batch. Gradients are accumulated over the parts of a
        batch.
    precision
        ``"bfloat16"`` is autocast over fp32 weights.
    validations
        Number of validations, evenly spread, the last at the end.
    checkpoints
        Number of times that the state is saved.
    report_to
        Hugging Face Trainer's reporters: ``["tensorboard"]``.
    shard
        FSDP2: shard parameters, gradients and moments over the processes of torchrun instead of copying them to each.
    fold_at
        Fraction of the steps after which mixing is folded into the projections and frozen at the identity.
    divergence
        A run has diverged if its mean loss over `DIVERGENCE_WINDOW` steps exceeds that of a uniform guess by this much.
    """

    seed: Seed = 0
    micro_batch_rows: Count | None = None
    precision: Precision = "float32"
    compile: StrictBool = False
    validations: Count = 10
    checkpoints: Count = 4
    log_every: Count = 1
    report_to: Names = ()
    shard: StrictBool = False
    fold_at: Share | None = None
    divergence: Annotated[float, Field(strict=True)] = 0.5

    def __post_init__(self) -> None:
        if self.shard and self.fold_at is not None:
            raise ValueError("run.fold_at changes whole matrices, which run.shard splits: give one of the two")


@dataclass(frozen=True, config=CONFIG)
class PretrainSettings:
    """Settings of a run; its record copies `labels` (``arm``, ``mixing``, ``norm``), for tables and effects."""

    data: DataSettings
    model: ModelSettings = field(default_factory=ModelSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    run: RunSettings = field(default_factory=RunSettings)
    labels: Table = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_model(self.model, self.data)
        if self.optim.batch_tokens % self.data.row:
            raise ValueError(
                f"optim.batch_tokens ({self.optim.batch_tokens}) must be a multiple of data.row ({self.data.row})"
            )

    @property
    def rows_per_batch(self) -> int:
        """Rows of one optimiser step, over all processes."""
        return self.optim.batch_tokens // self.data.row


def _check_model(model: ModelSettings, data: DataSettings) -> None:
    """Build one layer without weights: sizes that do not fit each other end here, before anything is written."""
    try:
        config = model.config(data.model_vocabulary, 0, data.row)
        with torch.device("meta"):
            MeaDecoderLayer(config, 0)
    except ValueError as error:
        raise ValueError(f"[model]: {error}") from error
    except (ArithmeticError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"[model] {model.changes} cannot be built: {type(error).__name__}: {error}") from error


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
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    except RecursionError:
        raise ValueError(f"{path} is not TOML: it is nested too deep") from None


def settings_from(tables: dict[str, Any]) -> PretrainSettings:
    """Settings from nested dicts, as TOML gives them; see `read_settings`."""
    return build(PretrainSettings, tables)
