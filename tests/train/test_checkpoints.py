"""A checkpoint counts only by a mark of our own that fits its files, and its mark names no file elsewhere."""

import json

import pytest

from mea.train.checkpoints import MARK, checksum_of, is_complete, last_complete, mark_complete


def test_the_newest_complete_checkpoint_counts(tmp_path):
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    mark_complete(tmp_path / "checkpoint-2")
    assert last_complete(tmp_path) == (tmp_path / "checkpoint-2", ["checkpoint-10"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-best"]


@pytest.mark.parametrize("content", ["", "[1]", "7", '{"weights": 3}', '{"weights": [1]}', "{}"])
def test_what_is_no_mark(tmp_path, content):
    (tmp_path / "weights").write_text("a")
    (tmp_path / MARK).write_text(content)
    assert not is_complete(tmp_path)


def test_a_mark_names_no_file_elsewhere(tmp_path):
    folder, other = tmp_path / "checkpoint-2", tmp_path / "other"
    folder.mkdir()
    other.write_text("a")
    (folder / MARK).write_text(json.dumps({"../other": [1, checksum_of(other)]}))
    assert not is_complete(folder)
