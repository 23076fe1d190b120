"""Recover SmolLM2-135M at half of its cache from several starts, and the rows of the paper's second table, in small.

    python experiments/recovery/run.py position --text wiki.txt --text books.txt --text docstrings.txt

Each row is compressed, trained and written to ``records/``; an interrupted row goes on, a finished one is not repeated.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from mea.compression import Calibration
from mea.compression.comparison import packaged_model
from mea.compression.folder import compress_to_folder
from mea.train.recovery_folder import recover_to_folder
from mea.train.recovery_settings import recovery

HERE = Path(__file__).parent
SCALE: dict[str, Any] = {"reread": 0.0, "batch": 4, "held_out": 8192, "evaluations": 5, "checkpoints": 20}
SHORT, LONG = 200_000, 1_000_000
SMALL_STEPS = {"batch": 1, "micro_batch": 1, "rate": 5e-4, "other_rate": 5e-4}
LONG_WINDOWS = SMALL_STEPS | {"window": 1024, "rate": 7e-4, "other_rate": 7e-4}


def prose(method: str, tokens: int = 16384, **options: Any) -> dict[str, Any]:
    """Fitted on windows of which no part is read again, as when the rows that say so were begun."""
    return {"method": method, "calibration": Calibration(tokens=tokens, reread=0.0), **options}


LIKE_DEFAULT = SMALL_STEPS | {"reread": 0.5}
SVD = {"method": "svd"}
# name -> how it is compressed, stages, tokens of each, other settings; a row whose first part is a name has its start.
# Rows with `cpt` are the paper's second table, on the same tokens; those of RESULTS begin at another row's result.
ROWS: dict[str, tuple[Any, ...]] = {
    "joint": (prose("joint"), ("near",), SHORT),
    "position": (prose("position"), ("distil",), SHORT),
    "refined": (prose("position", 32768, refine=2), ("distil",), SHORT),
    "frequency": ({"method": "frequency"}, ("distil",), SHORT, LIKE_DEFAULT),
    "gauge": ({"method": "gauge"}, ("distil",), SHORT, LIKE_DEFAULT),
    "svd": (SVD, ("distil",), SHORT, LIKE_DEFAULT),
    "attended": (prose("attended", 65536, refine=2), ("distil",), SHORT),
    "blended": (
        {"method": "blended", "refine": 2, "calibration": Calibration(tokens=65536)},
        ("distil",),
        SHORT,
        LIKE_DEFAULT,
    ),
    "million": ("refined", ("distil",), LONG, SMALL_STEPS),
    "attended-million": ("attended", ("distil",), LONG, LONG_WINDOWS),
    "attended-small-steps": ("attended", ("distil",), LONG, SMALL_STEPS),
    "blended-million": ("blended", ("distil",), LONG, LIKE_DEFAULT),
    "joint-million": ("joint", ("near",), LONG),
    "whole-cpt": ({"keep": 1.0}, ("cpt",), SHORT),
    "half-cpt": (SVD | {"layout": "half"}, ("cpt",), SHORT),
    "deep-cpt": (SVD | {"layout": "deep"}, ("cpt",), SHORT),
    "full-cpt": ("svd", ("cpt",), SHORT),
    "full-recover-cpt": ("svd", ("cpt",), SHORT),
    "attended-cpt": ("attended", ("cpt",), SHORT),
    "attended-recover-cpt": ("attended", ("cpt",), SHORT),
}
RESULTS = ("full-recover-cpt", "attended-recover-cpt")


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
        how, stages, tokens, *changes = ROWS[name]
        scale = SCALE | (changes[0] if changes else {})
        begun = how if isinstance(how, str) else name
        start, out = options.work / (begun if name in RESULTS else f"{begun}-start"), options.work / name
        if not start.is_dir():
            if name in RESULTS:
                parser.error(f"{name} begins with what {begun} ends with: make that first")
            compress_to_folder(source, start, dtype="float32", measure_tokens=0, **ROWS[begun][0])
        if not out.is_dir():
            settings = [recovery(stage, tokens=tokens, **scale) for stage in stages]
            made = recover_to_folder(
                str(start), out, settings, options.text, original=source, measure_tokens=20480, progress=tell
            )
            print(name, made["results"])
        record.parent.mkdir(exist_ok=True)
        shutil.copy(out / "recovery.json", record)


def tell(what: str, done: int, of: int) -> None:
    if done == of or done % 10 == 0:
        print(what, done, of, flush=True)


if __name__ == "__main__":
    main()
