"""What a run trains on: text from shards, or a task whose rows are drawn."""

from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from mea.records import Progress
from mea.train.pretraining.dataset import TokenStream, TrainingRows, ValidationRows
from mea.train.pretraining.recall import BLANK, RecallRows
from mea.train.pretraining.settings import PretrainSettings
from mea.train.pretraining.tokenise import load_tokenizer, prepare

TRAINING, VALIDATION = 0, 1  # first seeds of a task's rows


@dataclass(frozen=True)
class Source:
    """Rows of training and of validation, and the tokens of the model: how many, the last of a text, the tokenizer."""

    rows: Dataset
    validation: Dataset
    vocabulary: int
    end: int
    tokenizer: PreTrainedTokenizerBase | None = None


def open_source(settings: PretrainSettings, cache: str | Path, progress: Progress | None = None) -> Source:
    """The rows of a run; text is tokenised into `cache` unless that is done.

    Raises
    ------
    ValueError
        A text that is too short for a batch or for a row of validation, or what `prepare` raises.
    """
    return _text(settings, prepare(settings.data, cache, progress)) if settings.data.recall is None else _task(settings)


def _text(settings: PretrainSettings, shards: Path) -> Source:
    data, count = settings.data, settings.rows_per_batch * settings.optim.steps
    tokenizer, stream = load_tokenizer(shards), TokenStream(shards, "train")
    end = tokenizer.eos_token_id
    assert isinstance(end, int)  # `prepare` refuses a tokenizer without one
    rows = TrainingRows(stream, data.row, count, settings.run.seed)
    if rows.available < settings.rows_per_batch:
        raise ValueError(
            f"the training split has {len(stream):,} tokens, {rows.available} rows of {data.row}: less than one batch "
            f"of {settings.rows_per_batch} rows. Give more text or a smaller optim.batch_tokens"
        )
    validation = ValidationRows(TokenStream(shards, "validation"), data.row, data.validation_tokens)
    return Source(rows, validation, len(tokenizer), end, tokenizer)


def _task(settings: PretrainSettings) -> Source:
    """All runs share the validation rows, whatever their seed: their accuracies differ by training alone."""
    data, task = settings.data, settings.data.recall
    assert task is not None
    count = settings.rows_per_batch * settings.optim.steps
    scored = max(len(task.scored_pairs), data.validation_tokens // data.row)
    rows = RecallRows(task, task.pairs, data.row, count, (TRAINING, settings.run.seed))
    validation = RecallRows(task, task.scored_pairs, data.row, scored, (VALIDATION,))
    return Source(rows, validation, task.vocabulary, BLANK)
