"""Associative recall: what rows hold, what settings refuse, and that attention is what learns it."""

import math

import numpy as np
import pytest
import torch

from mea.models.lm_head import IGNORED
from mea.records import read_record
from mea.report.render.html import render
from mea.report.render.markdown import markdown
from mea.report.schema import check_fields
from mea.report.sections.pretraining import sections
from mea.train.pretraining.recall import BLANK, RecallRows, RecallSettings, recall_row
from mea.train.pretraining.record import end_message
from mea.train.pretraining.run import pretrain
from mea.train.pretraining.settings import settings_from
from mea.train.pretraining.source import open_source

TASKS = [
    RecallSettings(pairs=(16,), keys=32, values=8),
    RecallSettings(pairs=(16,), keys=16, values=64, queries=5),
    RecallSettings(pairs=(16,), keys=64, keys_per_query=2),
    RecallSettings(pairs=(16,), keys=4, keys_per_query=2, queries=16),  # every key that there is
    RecallSettings(pairs=(16,), keys=9, keys_per_query=3),
]


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_is_the_value_of_its_key(task):
    width, pairs, row = task.keys_per_query + 1, 16, 150
    for seed in range(20):
        tokens, labels = recall_row(task, pairs, row, np.random.default_rng(seed))
        entries = tokens[: pairs * width].reshape(pairs, width)
        value_of = {tuple(entry[:-1]): entry[-1] for entry in entries.tolist()}
        assert len(value_of) == pairs, "keys of a row differ"
        assert entries[:, :-1].min() >= 1
        assert entries[:, :-1].max() <= task.keys
        assert entries[:, -1].min() > task.keys
        assert entries[:, -1].max() < task.vocabulary
        (answers,) = np.nonzero(labels != IGNORED)
        asked = [tuple(tokens[at - width + 1 : at].tolist()) for at in answers]
        assert len(set(asked)) == len(asked) == task.queries_of(pairs), "no key is asked for twice"
        assert [value_of[key] for key in asked] == labels[answers].tolist() == tokens[answers].tolist()
        rest = np.ones(row, bool)
        rest[: pairs * width] = False
        rest[(answers[:, None] - np.arange(width)).ravel()] = False
        assert (tokens[rest] == BLANK).all()


def test_keys_of_two_tokens_share_them():
    """Of 16 keys formed of at most 6 tokens, some begin and some end alike: one token does not tell the value."""
    task = RecallSettings(pairs=(16,), keys=64, keys_per_query=2)
    for seed in range(20):
        entries = recall_row(task, 16, 96, np.random.default_rng(seed))[0][:48].reshape(16, 3)
        assert len(np.unique(entries[:, 0])) <= math.ceil(math.sqrt(32))
        assert len(np.unique(entries[:, 1])) <= math.ceil(math.sqrt(32))


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_places_follow_the_power_law(power):
    """Counts of 4,000 draws are binomial: none is five standard deviations off."""
    task, draws = RecallSettings(pairs=(4,), queries=1, power=power), 4000
    rng = np.random.default_rng(0)
    places = [np.flatnonzero(recall_row(task, 4, 28, rng)[1] != IGNORED)[0] for _ in range(draws)]
    counts = np.bincount((np.array(places) - 8) // 2, minlength=10)
    law = np.arange(1.0, 11) ** (power - 1)
    law /= law.sum()
    assert len(counts) == 10
    assert (abs(counts - draws * law) < 5 * np.sqrt(draws * law * (1 - law))).all()


def tables(**changes):
    recall = {"pairs": [4, 8], "keys": 32, "values": 32}
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    return {
        "data": {"recall": recall, "row": 64, "validation_tokens": 640} | changes.pop("data", {}),
        "model": {"variant": "transformer", "changes": small | {"num_hidden_layers": 2} | changes.pop("model", {})},
        "optim": {"tokens": 20 * 128, "batch_tokens": 128} | changes.pop("optim", {}),
        "run": {"validations": 4, "checkpoints": 5} | changes.pop("run", {}),
    }


def rows_of(seed: int) -> tuple[RecallRows, RecallRows]:
    source = open_source(settings_from(tables(optim={"tokens": 12_800}, run={"seed": seed})), "unused")
    assert isinstance(source.rows, RecallRows)
    assert isinstance(source.validation, RecallRows)
    return source.rows, source.validation


def test_rows_depend_on_their_number_and_seed_alone():
    training, validation = rows_of(0)
    again, same_validation = rows_of(0)
    other, other_validation = rows_of(1)
    for index in (0, 1, 7):
        for name, values in training[index].items():
            assert torch.equal(again[index][name], values)
        assert torch.equal(validation[index]["input_ids"], same_validation[index]["input_ids"])
        assert torch.equal(validation[index]["input_ids"], other_validation[index]["input_ids"])
    drawn = [{tuple(rows[i]["input_ids"].tolist()) for i in range(len(rows))} for rows in (training, other, validation)]
    assert [len(rows) for rows in drawn] == [200, 200, 10]
    assert len(set.union(*drawn)) == 410, "no row is drawn twice"


def test_numbers_of_pairs_take_turns():
    task = RecallSettings(pairs=(4, 8), validation_pairs=(16, 2, 4))
    rows = RecallRows(task, task.scored_pairs, 64, 7, (1,))
    counted = [int((rows[i]["labels"] != IGNORED).sum()) for i in range(7)]
    assert counted == [2, 4, 16, 2, 4, 16, 2]
    assert rows.mean_by_pairs(torch.arange(7.0)) == [3.0, 2.5, 3.5]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"files": ["a.txt"]}, "data: give either files or hub or recall"),
        ({"vocabulary": 512}, "data.vocabulary is a setting of text, and data.recall has none"),
        ({"row": 16}, r"data.row \(16\) must be at least 32, for the pairs"),
        ({"recall": {"pairs": []}}, "data.recall.pairs: "),
        ({"recall": {"pairs": [4, 0]}}, "data.recall.pairs 2 must be greater than or equal to 1, not 0"),
        ({"recall": {"pairs": "many"}}, "data.recall.pairs must be a valid list, not 'many'"),
        ({"recall": {"pairs": 8, "keys": 7}}, r"data.recall.keys \(7\) are too few for 8 different keys of 1 token$"),
        ({"recall": {"validation_pairs": 17, "keys": 4, "keys_per_query": 2}}, "too few for 17 .* of 2 tokens"),
        ({"recall": {"values": 1}}, "data.recall.values must be 2 or more"),
        ({"recall": {"power": 0}}, "data.recall.power must be greater than 0, not 0"),
        ({"recall": {"power": 2}}, "data.recall.power must be less than or equal to 1, not 2"),
        ({"recall": {"keys_per_query": 9}}, "data.recall.keys_per_query must be less than or equal to 8, not 9"),
        ({"recall": {"key": 8}}, r"\[data.recall\] has no 'key'; known are pairs.*did you mean 'keys'"),
        ({"recall": True}, r"\[data.recall\] must be a table"),
    ],
)
def test_what_is_wrong_is_said(data, message):
    with pytest.raises(ValueError, match=message):
        settings_from(tables(data=data))


def test_the_vocabulary_follows_from_the_alphabets():
    settings = settings_from(tables())
    assert open_source(settings, "unused").vocabulary == settings.data.model_vocabulary == 1 + 32 + 32


def easy(**model):
    """Two pairs of eight keys and eight values: a Transformer of two layers learns it in seconds.

    With tied embeddings it takes many times as long. With two queries, the second has the value that is left.
    """
    return settings_from(
        tables(
            data={"recall": {"pairs": 2, "keys": 8, "values": 8, "queries": 1}, "row": 6, "validation_tokens": 3072},
            model={"tie_word_embeddings": False, "initializer_range": 0.05} | model,
            optim={"tokens": 300 * 768, "batch_tokens": 768, "learning_rate": 5e-3, "warmup_tokens": 20 * 768},
            run={"validations": 2, "checkpoints": 1},
        )
    )


def test_a_transformer_learns_it_and_without_attention_nothing_does(tmp_path):
    """With a window of one token each sees itself alone: the best guess among eight values is right once in eight."""
    learned = pretrain(easy(), tmp_path / "whole", cache=tmp_path)
    assert learned["results"]["accuracy"] > 0.95
    blind = pretrain(easy(sliding_window=1), tmp_path / "blind", cache=tmp_path)
    assert blind["results"]["accuracy"] < 0.25
    assert blind["results"]["validation_loss"] > 0.9 * math.log(8)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("recall")
    return pretrain(settings_from(tables()), out, cache=out), out


def test_the_record_holds_accuracies(alone):
    record, out = alone
    assert record["config"]["pairs"] == [4, 8]
    assert record["config"]["vocabulary"] == 65
    assert [len(entry) for entry in record["samples"]["accuracy"]] == [2] * 5
    last = record["samples"]["accuracy"][-1]
    assert record["results"]["accuracy"] == pytest.approx(sum(last) / 2, abs=1e-3)
    assert end_message(record).endswith(f"accuracy {record['results']['accuracy']:.1%}")
    assert read_record(out / "record.json") == record
    assert not list((out / "model").glob("tokenizer*"))


def test_resuming_gives_the_same_record(alone, tmp_path):
    class Stop(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("steps") and done == 14:
            raise Stop

    with pytest.raises(Stop):
        pretrain(settings_from(tables()), tmp_path, cache=tmp_path, progress=stop)
    again = pretrain(settings_from(tables()), tmp_path, cache=tmp_path)
    assert again["samples"] == alone[0]["samples"]
    with pytest.raises(ValueError, match=r"other settings \(data.recall\)"):
        pretrain(settings_from(tables(data={"recall": {"pairs": 4}})), tmp_path, cache=tmp_path)


def test_the_report_shows_accuracy(alone):
    record, _ = alone
    (section,) = sections([record])
    part = next(part for part in section.parts if part.heading == "Accuracy of recall")
    assert part.table is not None
    assert part.table.header[3:] == ["tokens to half", "mean", "4 pairs", "8 pairs"]
    curve = zip(record["samples"]["validation_tokens"], record["samples"]["accuracy"], strict=True)
    half = next((f"{tokens / 1e6:.2f}" for tokens, entry in curve if sum(entry) / 2 >= 0.5), "–")
    ends = [100 * value for value in record["samples"]["accuracy"][-1]]
    assert part.table.lines == [
        ["transformer", "0.003", "1", half, f"{sum(ends) / 2:.1f}", f"{ends[0]:.1f}", f"{ends[1]:.1f}"]
    ]
    assert [figure.name for figure in part.figures] == ["recall-pairs-constant", "recall-tokens-constant"]
    assert "| variant | learning rate | seeds | tokens to half | mean | 4 pairs | 8 pairs |" in markdown([section])
    assert "Accuracy against the number of pairs" in render([record])
    check_fields(record, "record.json")
    with pytest.raises(ValueError, match=r"record.json: .*not one value for each of config.pairs"):
        check_fields(record | {"config": record["config"] | {"pairs": [4]}}, "record.json")
