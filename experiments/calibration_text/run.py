"""What SmolLM2-135M at half of its cache costs, by the text it was calibrated on, by the draw of it, and by how much.

    python experiments/calibration_text/run.py [RUN ...]

Every run is one record in ``records/``, which is not made again; without names all runs that are missing are made. Then
the table in the README is written from the records; ``--table`` does that alone.
"""

import argparse
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch

from mea.compression.api import run_plans
from mea.compression.calibrate.layerwise import LayerWalk
from mea.compression.calibrate.text import Calibration, calibration_tokens
from mea.compression.convert import checked_stock_form
from mea.compression.options import CompressOptions
from mea.compression.plan import make_plan
from mea.evaluate.perplexity import block_means, perplexity, ratio, token_losses
from mea.models.loading import load, packaged_model
from mea.records import make_record, read_record, write_record
from mea.report import write_markdown
from mea.report.parts import Part, Section, Table
from mea.text import encode_text, load_text, start_token

RECORDS, README = Path(__file__).parent / "records", Path(__file__).parent / "README.md"
TESTED, WINDOW = {"wikitext-2-test": 20480, "technical": 4096}, 1024  # as in experiments/smollm2
SIZE = 16384


class Run(NamedTuple):
    """One compression: the packaged text it is calibrated on, how much of it, and which windows."""

    text: str
    tokens: int = SIZE
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.text}-{self.tokens // 1024}k-{self.seed}"


SEEDS = [Run(text, seed=seed) for seed in (0, 1, 2) for text in ("calibration", "encyclopaedic")]
RUNS = {run.name: run for run in [*SEEDS, Run("calibration", 4 * SIZE)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="of " + ", ".join(RUNS))
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    if unknown := set(options.runs) - set(RUNS):
        parser.error(f"no runs {', '.join(sorted(unknown))}: there are {', '.join(RUNS)}")
    missing = [run for name, run in RUNS.items() if name in (options.runs or RUNS) and not path(run).is_file()]
    if missing and not options.table:
        make(missing)
    write_table()


def make(missing: list[Run]) -> None:
    model, tokenizer = load(packaged_model(), "float32")
    tokens = {text: encode_text(tokenizer, load_text(text), count) for text, count in TESTED.items()}
    reference = losses(model, tokenizer, tokens)
    for run in missing:
        one(run, model, tokenizer, tokens, reference)


def path(run: Run) -> Path:
    return RECORDS / f"{run.name}.json"


def losses(model, tokenizer, tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of every tested text."""
    return {text: token_losses(model, ids, WINDOW, start=start_token(tokenizer)) for text, ids in tokens.items()}


def one(run: Run, model, tokenizer, tokens, reference) -> None:
    calibration = Calibration(run.text, run.tokens, seed=run.seed)
    plan = make_plan(model.config, 4, CompressOptions(keep=0.5, method="post_rope", calibration=calibration))
    windows = calibration_tokens(tokenizer, calibration)
    result = run_plans(LayerWalk(checked_stock_form(model, windows)), windows, [plan])[0]
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
        **plan.describe(), "model": Path(packaged_model()).name, "scored_in": "float32",
        "tested_tokens": TESTED, "tested_window": WINDOW,
    }  # fmt: skip
    results = {"texts": texts, "compress_seconds": result.seconds}
    write_record(path(run), make_record("calibration_text", config, results=results, samples=samples,
                                        seeds={"calibration": run.seed}))  # fmt: skip
    print(run.name, {text: round(values["ratio"], 3) for text, values in texts.items()}, flush=True)


def write_table() -> None:
    """Put the runs that are there into the README, and their spread over draws."""
    head = ["calibration text", "tokens", "seed", *TESTED, "compressed in"]
    lines = []
    there = sorted(run for run in RUNS.values() if path(run).is_file())
    for (text, size), group in groupby(there, lambda run: run[:2]):
        found = [(run, read_record(path(run))["results"]) for run in group]
        for run, results in found:
            values = [results["texts"][tested] for tested in TESTED]
            ratios = [f"{value['ratio']:.3f} ± {value['ratio_standard_error']:.3f}" for value in values]
            lines.append([text, f"{size:,}", str(run.seed), *ratios, f"{results['compress_seconds']:.0f} s"])
        if len(found) > 2:
            ratios = [[results["texts"][tested]["ratio"] for _, results in found] for tested in TESTED]
            spread = [f"{mean(values):.3f}, spread {stdev(values):.3f}" for values in ratios]
            lines.append([text, f"{size:,}", "all", *spread, ""])
    write_markdown([Section("Runs", [Part(table=Table(head, lines))])], README)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
