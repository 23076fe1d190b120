"""Two models on the same long contexts, prompt by prompt."""

from typing import Any

from mea.evaluate.long_context.cells import SCORES
from mea.evaluate.long_context.plan import POSITION
from mea.evaluate.paired import average_difference, paired_difference
from mea.records import Record, make_record

PAIRED = "paired long context"
SAME = ("prompts", "tasks", "lengths", "limit")


def compare(first: Record, second: Record) -> Record:
    """Differences of scores by task and length, of each task's average over lengths, and of losses by position.

    Items are prompts, and of the loss blocks of the text. Lengths with a single item are left out.

    Raises
    ------
    ValueError
        The records are not of the same prompts.
    """
    differing = [key for key in SAME if first["config"][key] != second["config"][key]]
    if differing or first["seeds"] != second["seeds"]:
        raise ValueError(f"the two models were not asked the same: {', '.join(differing) or 'seeds'} differ")
    results: dict[str, Any] = {"lengths": [], "tasks": {}, "positions": []}
    for task, lengths in first["samples"].items():
        others = second["samples"][task]
        if task == POSITION:
            for stop, losses in lengths.items():
                if len(losses) > 1:
                    difference = paired_difference(losses, others[stop]).as_dict()
                    results["positions"].append({"stop": int(stop)} | difference)
            continue
        several = [tokens for tokens, scores in lengths.items() if len(scores[SCORES[0]]) > 1]
        for tokens in several:
            for score in SCORES:
                difference = paired_difference(lengths[tokens][score], others[tokens][score]).as_dict()
                results["lengths"].append({"task": task, "tokens": int(tokens), "score": score} | difference)
        if several:
            sides = [{score: {n: one[n][score] for n in several} for score in SCORES} for one in (lengths, others)]
            results["tasks"][task] = {score: average_difference(sides[0][score], sides[1][score]) for score in SCORES}
    config = {"first": first["config"]["label"], "second": second["config"]["label"]}
    config |= {key: first["config"][key] for key in SAME}
    for key in ("dtype", "cache_bits"):
        config[key] = [record["config"][key] for record in (first, second)]
    return make_record(PAIRED, config, results=results, seeds=first["seeds"] | {"bootstrap": 0})
