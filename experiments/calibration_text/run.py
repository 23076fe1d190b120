"""What SmolLM2-135M at half of its cache costs, by the text it was calibrated on. On validation texts only.

    python scripts/make_texts.py … --technical 0.33 --out build/texts/mixed-33   # and mixed-20, mixed-50
    python experiments/calibration_text/run.py --texts build/texts [RUN ...]

Every run is one record in ``records/``, which is not made again; without names all runs that are missing are made. Then
the table in the README is written from the records; ``--table`` does that alone.
"""

import argparse
import copy
import hashlib
from pathlib import Path
from typing import NamedTuple

import torch

from mea.compression.check import checked_stock_form
from mea.compression.comparison import packaged_model
from mea.compression.compress import calibration_tokens, run_plans
from mea.compression.plan import Calibration, make_plan
from mea.evaluate.perplexity import block_means, encode_text, perplexity, ratio, start_token, token_losses
from mea.models.loading import load
from mea.records import make_record, read_record, write_record
from mea.texts import NAMES, load_text

RECORDS, README = Path(__file__).parent / "records", Path(__file__).parent / "README.md"
START, END = "<!-- table: written by run.py from the records -->", "<!-- end of table -->"
TESTED, TOKENS, WINDOW = ("wikitext-2-valid", "technical-valid"), 8192, 1024
SIZE = 16384


class Run(NamedTuple):
    """One compression: the text it is calibrated on, which windows of it, and how much."""

    text: str
    seed: int = 0
    tokens: int = SIZE

    @property
    def name(self) -> str:
        return f"{self.text}-{self.tokens // 1024}k-{self.seed}"


# First the shares at one seed, then the spread of the old default and of the new, then more tokens of the new.
SHARES = [Run(text) for text in ("mixed-20", "encyclopaedic", "mixed-50", "mixed-33")]
SEEDS = [Run(text, seed) for seed in (1, 2) for text in ("mixed-20", "encyclopaedic")]
LENGTHS = [Run("mixed-20", tokens=tokens) for tokens in (2 * SIZE, 4 * SIZE)]
RUNS = {run.name: run for run in SHARES + SEEDS + LENGTHS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="of " + ", ".join(RUNS))
    parser.add_argument("--texts", type=Path, default=Path("build/texts"), help="holds mixed-N/calibration.txt.gz")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    if unknown := set(options.runs) - set(RUNS):
        parser.error(f"no runs {', '.join(sorted(unknown))}: there are {', '.join(RUNS)}")
    missing = [run for name, run in RUNS.items() if name in (options.runs or RUNS) and not path(run).is_file()]
    if missing and not options.table:
        make(missing, options.texts)
    write_table()


def make(missing: list[Run], folder: Path) -> None:
    model, tokenizer = load(packaged_model(), "float32")
    tokens = {text: encode_text(tokenizer, load_text(text), TOKENS) for text in TESTED}
    reference = losses(model, tokenizer, tokens)
    for run in missing:
        if not path(run).is_file():
            one(run, folder, model, tokenizer, tokens, reference)


def path(run: Run) -> Path:
    return RECORDS / f"{run.name}.json"


def losses(model, tokenizer, tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of every tested text, in bf16."""
    scored = copy.deepcopy(model).bfloat16()
    return {text: token_losses(scored, ids, WINDOW, start=start_token(tokenizer)) for text, ids in tokens.items()}


def one(run: Run, folder: Path, model, tokenizer, tokens, reference) -> None:
    source = run.text if run.text in NAMES else str(folder / run.text / "calibration.txt.gz")
    calibration = Calibration(source, run.tokens, seed=run.seed)
    plan = make_plan(model.config, 4, method="position", keep=0.5, calibration=calibration)
    windows = calibration_tokens(tokenizer, calibration)
    result = run_plans(checked_stock_form(model, windows), windows, [plan])[0]
    texts = {}
    samples = {}
    for text, found in losses(result.model, tokenizer, tokens).items():
        own, relative = perplexity(found), ratio(found, reference[text])
        texts[text] = {
            "perplexity": own.value, "standard_error": own.standard_error,
            "ratio": relative.value, "ratio_standard_error": relative.standard_error,
        }  # fmt: skip
        samples[f"loss_{text}"] = block_means(found)
        samples[f"loss_{text}_uncompressed"] = block_means(reference[text])
    config = {
        **plan.describe(), "calibration_text": run.text, "model": Path(packaged_model()).name, "scored_in": "bfloat16",
        "calibration_sha256": hashlib.sha256(load_text(source).encode("utf-8")).hexdigest(),
        "tested_tokens": TOKENS, "tested_window": WINDOW,
    }  # fmt: skip
    results = {"texts": texts, "compress_seconds": result.seconds}
    write_record(path(run), make_record("calibration_text", config, results=results, samples=samples,
                                        seeds={"calibration": run.seed}))  # fmt: skip
    print(run.name, {text: round(values["ratio"], 3) for text, values in texts.items()}, flush=True)


def write_table() -> None:
    """Put the runs that are there into the README."""
    head = ["calibration text", "tokens", "seed", *TESTED, "compressed in"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for run in sorted(RUNS.values()):
        if not path(run).is_file():
            continue
        results = read_record(path(run))["results"]
        values = [results["texts"][text] for text in TESTED]
        ratios = [f"{value['ratio']:.3f} ± {value['ratio_standard_error']:.3f}" for value in values]
        lines.append([run.text, f"{run.tokens:,}", str(run.seed), *ratios, f"{results['compress_seconds']:.0f} s"])
    before, rest = README.read_text(encoding="utf-8").split(START)
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    README.write_text(f"{before}{START}\n\n{table}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
