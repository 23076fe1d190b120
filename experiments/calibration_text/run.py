"""What SmolLM2-135M at half of its cache costs, by the text it was calibrated on. On validation texts only.

    python scripts/make_texts.py … --technical 0.33 --out build/texts/mixed-33   # and mixed-20, mixed-50
    python experiments/calibration_text/run.py --texts build/texts [RUN ...]

Every run is one record in ``records/``, which is not made again; without names all runs that are missing are made.
`table.py` writes the README's table from the records.
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
from mea.records import make_record, write_record
from mea.texts import NAMES, load_text

RECORDS = Path(__file__).parent / "records"
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
    parser.add_argument("--texts", type=Path, required=True, help="holds mixed-N/calibration.txt.gz")
    options = parser.parse_args()
    if unknown := set(options.runs) - set(RUNS):
        parser.error(f"no runs {', '.join(sorted(unknown))}: there are {', '.join(RUNS)}")
    missing = [run for name, run in RUNS.items() if name in (options.runs or RUNS) and not path(run).is_file()]
    if not missing:
        return
    model, tokenizer = load(packaged_model(), "float32")
    tokens = {text: encode_text(tokenizer, load_text(text), TOKENS) for text in TESTED}
    reference = losses(model, tokenizer, tokens)
    for run in missing:
        if not path(run).is_file():
            one(run, options.texts, model, tokenizer, tokens, reference)


def path(run: Run) -> Path:
    return RECORDS / f"{run.name}.json"


def losses(model, tokenizer, tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of every tested text, in bf16."""
    scored = copy.deepcopy(model).bfloat16()
    return {text: token_losses(scored, ids, WINDOW, start=start_token(tokenizer)) for text, ids in tokens.items()}


def one(run: Run, folder: Path, model, tokenizer, tokens, reference) -> None:
    source = run.text if run.text in NAMES else str(folder / run.text / "calibration.txt.gz")
    calibration = Calibration(source, run.tokens, seed=run.seed)
    plan = make_plan(model.config, 4, keep=0.5, calibration=calibration)
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


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
