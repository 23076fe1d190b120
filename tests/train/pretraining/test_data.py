"""Text becomes rows: every kind of file, splits that share nothing, documents that do not see each other, damage."""

import bz2
import gzip
import json
import tracemalloc

import numpy as np
import pytest
import torch

from mea import records
from mea.models.decoder import MeaForCausalLM
from mea.train.pretraining import documents as documents_module
from mea.train.pretraining import tokenise
from mea.train.pretraining.dataset import IGNORED, TokenStream, TrainingRows, ValidationRows, collate, row_of
from mea.train.pretraining.documents import documents, is_validation
from mea.train.pretraining.run import build_model
from mea.train.pretraining.settings import DataSettings
from mea.train.pretraining.tokenise import load_tokenizer, prepare
from tiny_corpus import SEPARATOR, some_documents

TEXTS = some_documents(40)


def write_jsonl(path, texts, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text, "n": 1}) + "\n" for text in texts)


def data(path, **changes) -> DataSettings:
    fields = {"separator": SEPARATOR, "vocabulary": 300, "validation_fraction": 0.2, "row": 16}
    return DataSettings(files=(str(path),), **{**fields, **changes})


@pytest.mark.parametrize("kind", ["txt", "txt.bz2", "jsonl", "jsonl.gz", "parquet"])
def test_documents_of_every_kind_of_file(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "txt":
        path.write_text(SEPARATOR.join(TEXTS), encoding="utf-8")
    elif kind == "txt.bz2":
        path.write_bytes(bz2.compress(SEPARATOR.join(TEXTS).encode()))
    elif kind == "parquet":
        pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        pq.write_table(pa.table({"text": TEXTS}), path)
    else:
        write_jsonl(path, TEXTS, gzip.open if kind.endswith("gz") else open)
    assert list(documents(data(path))) == TEXTS


def test_a_data_set_in_the_layout_of_the_hub(tmp_path):
    """A local folder stands for a data set's repository: its card names configurations and their files by split."""
    (tmp_path / "set" / "small").mkdir(parents=True)
    write_jsonl(tmp_path / "set" / "small" / "train-0.jsonl", TEXTS[:25])
    write_jsonl(tmp_path / "set" / "small" / "train-1.jsonl", TEXTS[25:])
    write_jsonl(tmp_path / "set" / "small" / "test.jsonl", ["not this one"])
    card = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: small/train-*.jsonl}
  - {split: test, path: small/test.jsonl}
---
"""
    (tmp_path / "set" / "README.md").write_text(card)
    hub = {"hub": str(tmp_path / "set"), "vocabulary": 300, "validation_fraction": 0.2, "row": 16}
    assert list(documents(DataSettings(**hub, hub_config="small"))) == TEXTS
    assert list(documents(DataSettings(**hub, hub_config="small", hub_split="test"))) == ["not this one"]
    folder = prepare(DataSettings(**hub, hub_config="small"), tmp_path / "cache")
    assert len(TokenStream(folder, "train")) > len(TokenStream(folder, "validation")) > 0
    with pytest.raises(ValueError, match="no text in column 'words'"):
        next(documents(DataSettings(**hub, hub_config="small", column="words")))


def test_a_separator_across_two_reads_is_found(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text(SEPARATOR.join(TEXTS), encoding="utf-8")
    monkeypatch.setattr(documents_module, "CHUNK", 7)
    assert list(documents(data(path))) == TEXTS


def test_text_is_streamed(tmp_path):
    """Thirty megabytes in 300 documents, in a few copies of one piece of the file and not in memory at once."""
    path = tmp_path / "a.txt"
    path.write_text(SEPARATOR.join(f"{i} " + "x" * 100_000 for i in range(300)), encoding="utf-8")
    tracemalloc.start()
    count = sum(1 for _ in documents(data(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 300
    assert peak < 8 * documents_module.CHUNK


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt.bz2", bz2.compress(b"some text" * 99)[:-9], "damaged"),
        ("a.txt.bz2", b"not bzip2 at all", "damaged"),
        ("a.txt", b"\xff\xfe\x00", "damaged, or not UTF-8"),
        ("a.txt.gz", gzip.compress(b"some text" * 99, mtime=0)[:15] + bytes(20), "damaged"),
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "damaged"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "damaged"),
        ("a.jsonl.gz", b"not gzip", "damaged"),
        ("a.parquet", b"", "empty"),
        ("a.jsonl", b'{"words": "a"}\n', "no text in column 'text'; there are words"),
        ("a.docx", b"", "known are"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(documents(data(path)))


def test_a_given_tokenizer_must_be_able_to_close_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(SEPARATOR.join(TEXTS), encoding="utf-8")
    tokenizer = load_tokenizer(prepare(data(path), tmp_path / "cache"))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    other = prepare(data(path, tokenizer=str(tmp_path / "tokenizer")), tmp_path / "cache")
    assert load_tokenizer(other).get_vocab() == tokenizer.get_vocab()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="no end-of-text token"):
        prepare(data(path, tokenizer=str(tmp_path / "endless")), tmp_path / "cache")


def test_the_splits_are_whole_documents_and_share_none(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(SEPARATOR.join(TEXTS), encoding="utf-8")
    settings = data(path)
    folder = prepare(settings, tmp_path / "cache")
    tokenizer = load_tokenizer(folder)
    found = {}
    for split in tokenise.SPLITS:
        stream = TokenStream(folder, split)
        text = tokenizer.decode(stream.read(0, len(stream))[0])
        found[split] = str(text).split(tokenise.END)[:-1]
    assert found["train"] == [text for text in TEXTS if not is_validation(text, 0.2)]
    assert found["validation"] == [text for text in TEXTS if is_validation(text, 0.2)]
    assert found["validation"]


def test_any_text_survives_the_tokenizer(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(SEPARATOR.join(TEXTS), encoding="utf-8")
    tokenizer = load_tokenizer(prepare(data(path), tmp_path / "cache"))
    text = "ünï\tcode \U0001f600 \x00 再"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenising_goes_on_after_the_last_whole_shard(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text(SEPARATOR.join(TEXTS), encoding="utf-8")
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 500)
    settings = data(path, shard_tokens=200)
    whole = prepare(settings, tmp_path / "whole")

    def stop(what: str, done: int, total: int) -> None:
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(settings, tmp_path / "stopped", stop)
    (folder,) = (tmp_path / "stopped").iterdir()
    kept = {p: p.stat().st_mtime_ns for p in folder.glob("train-*")}
    assert kept
    prepare(settings, tmp_path / "stopped")
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert (folder / "manifest.json").read_text() == (whole / "manifest.json").read_text()


def test_reading_across_shards_gives_the_same_rows(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text(SEPARATOR.join(TEXTS), encoding="utf-8")
    one = TokenStream(prepare(data(path), tmp_path / "one"), "train")
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 500)
    many = TokenStream(prepare(data(path, shard_tokens=100), tmp_path / "many"), "train")
    assert len(many.tokens) > 3
    for start in range(0, len(one) - 64, 31):
        for a, b in zip(one.read(start, 64), many.read(start, 64), strict=True):
            assert np.array_equal(a, b)


def test_a_damaged_or_missing_shard_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(SEPARATOR.join(TEXTS), encoding="utf-8")
    folder = prepare(data(path), tmp_path / "cache")
    tokens = folder / "train-00000.tokens"
    content = bytearray(tokens.read_bytes())
    content[5] ^= 1
    tokens.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00000.tokens is damaged .* delete the folder"):
        TokenStream(folder, "train")
    tokens.unlink()
    with pytest.raises(ValueError, match="is missing"):
        TokenStream(folder, "train")


def test_a_full_disk_says_what_it_lacks_and_leaves_no_half_shard(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text(SEPARATOR.join(TEXTS), encoding="utf-8")

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(records.os, "fsync", full)
        with pytest.raises(OSError, match=r"bytes to write, .* free"):
            prepare(data(path), tmp_path / "cache")
    assert not list(tmp_path.rglob("*.partial"))
    assert len(TokenStream(prepare(data(path), tmp_path / "cache"), "train")) > 0


def test_no_validation_document_is_an_error_before_training(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one document", encoding="utf-8")
    with pytest.raises(ValueError, match="no document fell into"):
        prepare(data(path, separator=None), tmp_path / "cache")


def test_rows_are_a_permutation_and_depend_on_the_seed_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(SEPARATOR.join(TEXTS), encoding="utf-8")
    stream = TokenStream(prepare(data(path), tmp_path / "cache"), "train")
    rows = TrainingRows(stream, 16, 3 * (len(stream) // 16), seed=1)
    n = rows.available
    first, second = ({tuple(rows[i]["input_ids"].tolist()) for i in range(e * n, (e + 1) * n)} for e in (0, 1))
    assert first == second
    order = [rows[i]["input_ids"] for i in range(2 * n)]
    assert not torch.equal(torch.stack(order[:n]), torch.stack(order[n:]))
    fresh = TrainingRows(stream, 16, 5, seed=1)
    assert torch.equal(fresh[3]["input_ids"], order[3])
    assert any(not torch.equal(TrainingRows(stream, 16, 5, seed=2)[i]["input_ids"], order[i]) for i in range(5))


def test_documents_in_one_row_do_not_see_each_other(settings, tmp_path):
    """Logits of each document are those it has alone (without a cache, as in training)."""
    path = tmp_path / "a.txt"
    path.write_text(SEPARATOR.join(TEXTS), encoding="utf-8")
    stream = TokenStream(prepare(data(path), tmp_path / "cache"), "train")
    row = row_of(stream, 0, 400)
    begins = (row["position_ids"] == 0).nonzero().flatten().tolist()
    assert len(begins) > 2
    assert [i for i in range(400) if row["labels"][i] == IGNORED] == begins
    torch.manual_seed(0)
    model: MeaForCausalLM = build_model(settings(data={"row": 400}, optim={"batch_tokens": 400}), 300, 0).eval()
    batch = collate([row])
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        for begin, end in zip(begins, [*begins[1:], 400], strict=True):
            alone = model(input_ids=row["input_ids"][None, begin:end]).logits[0]
            torch.testing.assert_close(together[begin:end], alone, rtol=1e-4, atol=1e-4)


def test_validation_rows_are_spread_over_the_split(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(SEPARATOR.join(TEXTS), encoding="utf-8")
    stream = TokenStream(prepare(data(path), tmp_path / "cache"), "validation")
    rows = ValidationRows(stream, 16, tokens=64)
    assert len(rows) == 4
    assert rows.chosen[0] == 0
    assert rows.chosen[-1] == len(stream) // 16 - 1
    with pytest.raises(ValueError, match="less than a row"):
        ValidationRows(stream, 1 << 20, tokens=64)
