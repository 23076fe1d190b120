"""Recover SmolLM2-135M from several starts, and the rows of the paper's second table, in small.

    python experiments/recovery/run.py uniform --text wiki.txt --text books.txt --text docstrings.txt

Each row is compressed, trained and written to ``records/``; an interrupted row goes on, a finished one is not repeated.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from mea.compression import Calibration
from mea.compression.save import compress_to_folder
from mea.models.loading import packaged_model
from mea.train.recovery.save import recover_to_folder
from mea.train.recovery.settings import Recovery, recovery

HERE = Path(__file__).parent
SHORT, LONG, TABLE, TRIED = 200_000, 1_000_000, 51_200, 25_600
PACKED, FEW = 102_400, 16_384  # of packed caches, and to try their rates
SMALL_STEPS: dict[str, Any] = {"batch": 1, "micro_batch": 1, "lr": 5e-4, "base_lr": 5e-4}
NEAR: dict[str, Any] = {"lr": 3e-4, "base_lr": 3e-4}  # for a start near the original
LONG_WINDOWS = SMALL_STEPS | {"window": 1024, "lr": 7e-4, "base_lr": 7e-4}


def stage(name: str, tokens: int, **changes: Any) -> Recovery:
    """A stage on the scale of these experiments, without copied tokens unless a row says so."""
    scale: dict[str, Any] = {"copy_fraction": 0.0, "held_out": 8192, "evaluations": 5, "checkpoints": 20}
    return recovery(name, tokens=tokens, **scale | changes)


def like_default(tokens: int, **changes: Any) -> Recovery:
    """The distillation by which starts are compared."""
    return stage("distill", tokens, copy_fraction=0.5, **SMALL_STEPS | changes)


def cpt(tokens: int, lr: float, **changes: Any) -> Recovery:
    """Continued pretraining in steps like those, at one learning rate relative to each tensor."""
    return stage("cpt", tokens, relative=True, batch=1, micro_batch=1, lr=lr, base_lr=lr, **changes)


def prose(method: str, tokens: int = 16384, **options: Any) -> dict[str, Any]:
    """Fitted on windows without copied tokens, as when these rows were begun."""
    return {"method": method, "calibration": Calibration(tokens=tokens, copy_fraction=0.0), **options}


def packed(method: str, keep: float) -> dict[str, Any]:
    """A packed cache as `experiments/coding` measures it."""
    return {"method": method, "keep": keep, "dtype": "bfloat16"}


def near_default(tokens: int, lr: float = 1e-4, **changes: Any) -> Recovery:
    """The distillation of packed caches, which begin near the original."""
    scale: dict[str, Any] = {"copy_fraction": 0.5, "batch": 2, "micro_batch": 2, "checkpoints": 4}
    return stage("distill", tokens, lr=lr, base_lr=lr, **scale | changes)


SVD, RANKED = {"method": "svd"}, {"method": "post_rope"}
# name -> how it is compressed, or the row that has the same start; stages, each with the best state of the one before
ROWS: dict[str, tuple[dict[str, Any] | str, *tuple[Recovery, ...]]] = {
    "joint": (prose("shared"), stage("distill", SHORT, **NEAR)),
    "uniform": (prose("post_rope:uniform"), stage("distill", SHORT)),
    "uniform-refined": (prose("post_rope:uniform", 32768, refine=2), stage("distill", SHORT)),
    "frequency": ({"method": "post_rope:frequency"}, like_default(SHORT)),
    "gauge": ({"method": "gauge"}, like_default(SHORT)),
    "svd": (SVD, like_default(SHORT)),
    "sensitivity": (prose("post_rope:sensitivity", 65536, refine=2), stage("distill", SHORT)),
    "mean": (RANKED | {"refine": 2, "calibration": Calibration(tokens=65536)}, like_default(SHORT)),
    "uniform-million": ("uniform-refined", stage("distill", LONG, **SMALL_STEPS)),
    "sensitivity-million": ("sensitivity", stage("distill", LONG, **LONG_WINDOWS)),
    "sensitivity-small-steps": ("sensitivity", stage("distill", LONG, **SMALL_STEPS)),
    "mean-million": ("mean", like_default(LONG)),
    "joint-million": ("joint", stage("distill", LONG, **NEAR)),
    "predictive": (packed("predictive", 0.2), near_default(PACKED)),
    "predictive-14": (packed("predictive", 0.14), near_default(PACKED // 2)),
    "whole": (RANKED | {"keep": 1.0}, like_default(SHORT)),
    "default": (RANKED, like_default(SHORT)),
}
# The paper's second table: start -> how it is compressed, and the learning rate of its continued pretraining. All read
# the same tokens; rows with recovery spend half of them on distillation.
TABLE_STARTS: dict[str, tuple[dict[str, Any] | str, float]] = {
    "whole": ("whole", 5e-4),
    "svd-half": (SVD | {"layout": "half"}, 1e-3),
    "svd-deep": (SVD | {"layout": "deep"}, 1e-3),
    "svd-full": ("svd", 1e-3),
    "default-half": (RANKED | {"layout": "half"}, 5e-4),
    "default-deep": (RANKED | {"layout": "deep"}, 5e-4),
    "default-full": ("default", 5e-4),
}
for start, (how, lr) in TABLE_STARTS.items():
    ROWS[f"{start}-cpt"] = (how, cpt(TABLE, lr, evaluations=2, checkpoints=4))
    if start.endswith("full"):
        half, few = TABLE // 2, {"evaluations": 1, "checkpoints": 2}
        ROWS[f"{start}-recover-cpt"] = (how, like_default(half, **few), cpt(half, lr, **few))
# What chose the learning rates, by held-out text.
for start in ("whole", "svd-full"):
    for lr in (1e-4, 5e-4, 1e-3):
        ROWS[f"{start}-at-{lr:g}"] = (TABLE_STARTS[start][0], cpt(TRIED, lr, evaluations=1, checkpoints=1))
for lr in (1e-4, 3e-4):
    ROWS[f"predictive-at-{lr:g}"] = ("predictive", near_default(FEW, lr, evaluations=1, checkpoints=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", choices=list(ROWS))
    parser.add_argument("--text", action="append", required=True, help="may be repeated; neither split of WikiText")
    parser.add_argument("--work", type=Path, default=Path("build/recovery"))
    options = parser.parse_args()
    source = packaged_model()
    for name in options.rows:
        record = HERE / "records" / f"{name}.json"
        if record.is_file():
            continue
        how, *stages = ROWS[name]
        begun = how if isinstance(how, str) else name
        start, out = options.work / f"{begun}-start", options.work / name
        if not start.is_dir():
            compress_to_folder(source, start, measure_tokens=0, **{"dtype": "float32"} | ROWS[begun][0])
        if not out.is_dir():
            count = 0 if "-at-" in name else 20480
            made = recover_to_folder(
                str(start), out, stages, options.text, original=source, measure_tokens=count, progress=tell
            )
            print(name, made["results"])
        record.parent.mkdir(exist_ok=True)
        shutil.copy(out / "recovery.json", record)


def tell(what: str, done: int, of: int) -> None:
    if done == of or done % 10 == 0:
        print(what, done, of, flush=True)


if __name__ == "__main__":
    main()
