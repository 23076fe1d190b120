"""Print the stages that follow the first of a sweep: more seeds at each variant's best learning rate and beside it.

    python experiments/recall/best.py RECORDS >> experiments/recall/sweep.toml

The best has the lowest validation loss with seed 0. At an edge of the rates that were tried there is one neighbour.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from mea.records import read_records

SEEDS = [1, 2]


def stages(folder: Path) -> str:
    """The stages as TOML: all best rates first, then the neighbours."""
    losses: dict[str, dict[float, float]] = defaultdict(dict)
    for record in read_records(folder):
        config, loss = record["config"], record["results"]["validation_loss"]
        if config["seed"] == 0:
            losses[config["arm"]][config["learning_rate"]] = float("inf") if loss is None else loss
    best, beside = defaultdict(list), defaultdict(list)
    edges = []
    for arm, by_lr in losses.items():
        lrs = sorted(by_lr)
        index = lrs.index(min(lrs, key=by_lr.__getitem__))
        best[lrs[index],].append(arm)
        beside[tuple(lrs[i] for i in (index - 1, index + 1) if 0 <= i < len(lrs))].append(arm)
        edges += [f"{arm} at {lrs[index]:g}"] if index in (0, len(lrs) - 1) else []
    warning = f"# The best rate of {', '.join(edges)} is at an edge: try a rate beyond.\n" if edges else ""
    return warning + "".join(
        f"\n# {title}\n[[stage]]\narms = {json.dumps(arms)}\nlearning_rates = {list(lrs)}\nseeds = {SEEDS}\n"
        for title, groups in (("Seeds at the best rate.", best), ("Seeds at its neighbours.", beside))
        for lrs, arms in sorted(groups.items())
        if lrs
    )


if __name__ == "__main__":
    print(stages(Path(sys.argv[1])), end="")
