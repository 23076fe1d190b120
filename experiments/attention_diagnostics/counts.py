"""What counting tokens, and pairs of tokens, costs on the validation split: the losses that blown-up runs end at.

    python experiments/attention_diagnostics/counts.py FOLDER_OF_BOOKS

Writes records/counts.json. The data are those of experiments/learning_rate/sweep.toml; the counts cover
its whole training split.
"""

import sys
from pathlib import Path

import numpy as np

from mea.records import make_record, write_record
from mea.train.pretraining.dataset import TokenStream
from mea.train.pretraining.settings import settings_from
from mea.train.pretraining.sweep_file import read_sweep
from mea.train.pretraining.tokenise import prepare

RECORD = Path(__file__).parent / "records" / "counts.json"
SMOOTHING = 200  # tokens that the frequencies count for in the context of one token


def main(*files: str) -> None:
    """Count, score, and write the record."""
    data = settings_from(read_sweep("experiments/learning_rate/sweep.toml", list(files))[0].tables).data
    shards = prepare(data, "build/pretraining/data")
    streams = [TokenStream(shards, split) for split in ("train", "validation")]
    train, text = (stream.read(0, len(stream))[0] for stream in streams)
    frequency = np.bincount(train, minlength=data.vocabulary) + 0.5
    frequency /= frequency.sum()
    pairs = np.zeros((data.vocabulary, data.vocabulary))
    np.add.at(pairs, (train[:-1], train[1:]), 1)
    following = (pairs + SMOOTHING * frequency) / (pairs.sum(1, keepdims=True) + SMOOTHING)
    results = {
        "loss_of_frequencies": -np.log(frequency[text]).mean(),
        "loss_of_pairs": -np.log(following[text[:-1], text[1:]]).mean(),
    }
    results = {name: round(float(value), 4) for name, value in results.items()}
    sizes = {"train": len(train), "validation": len(text), "vocabulary": data.vocabulary, "smoothing": SMOOTHING}
    write_record(RECORD, make_record("token counts", sizes, results=results))
    print(results)


if __name__ == "__main__":
    main(*sys.argv[1:])
