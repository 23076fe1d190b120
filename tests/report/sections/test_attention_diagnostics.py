"""What is drawn of the inside of attention is what the records hold, as far as they hold anything."""

import math
import re

import pytest

from mea.report.sections.attention_diagnostics import part
from mea.report.sections.pretraining import sections
from synthetic_runs import synthetic

ARMS = ("transformer", "mea", "groupnorm", "talking_heads")


def looked_into(arm: str, rate: float, seed: int = 0, *, schedule: str = "constant") -> dict:
    """A synthetic run of two layers: logits that grow with the rate, mixing that loses its condition."""
    run = synthetic(arm, rate, seed, shift=abs(math.log10(rate) + 3), schedule=schedule, diverged=rate > 0.5)
    samples, evaluations = run["samples"], len(run["samples"]["validation_tokens"])
    growth = [1 + 100 * rate * i for i in range(evaluations)]
    samples["largest_logit"] = [[None if arm == "talking_heads" else g, None] for g in growth]
    samples["grad_norm"] = [None if i == 5 else 1 + 0.1 * math.sin(i) for i in range(600)]
    samples["head_rms"] = [[[1.0, 2.0], [1.0, 5.0]]] * evaluations
    if arm != "talking_heads":
        samples["read_rms"] = [[[0.5, 0.35, 0.25, None], [0.5, 0.35, 0.25, None]]] * evaluations
    if arm == "mea":
        samples["key_mixing"] = [[[g, 1.0], [1.0, 1.0]] for g in growth]
        samples["value_mixing"] = [[[1.0, 0.0], [1.0, 0.5]]] * evaluations
    return run


@pytest.fixture(scope="module")
def runs():
    return [looked_into(arm, rate) for arm in ARMS for rate in (1e-3, 1e-2, 1.0)]


@pytest.fixture(scope="module")
def inside(runs):
    return part([synthetic("a", 1e-3, 0), *runs])


def test_nothing_is_drawn_of_runs_that_were_not_looked_into(inside):
    assert part([synthetic("a", 1e-3, 0)]) is None
    assert "a" not in [line[0] for line in inside.table.lines]


def test_the_table_tells_of_every_rate(inside):
    table = inside.table
    assert len(table.lines) == 12
    lines = {(line[0], line[1]): line[2:] for line in table.lines}
    assert lines["mea", "0.01"][1:] == ["30", "1", "1.58", "5", "30", "2"]  # a singular value of 0 has no condition
    assert lines["mea", "1"][0] == "diverged"
    assert lines["talking_heads", "0.001"][1] == "–"
    assert lines["groupnorm", "0.001"][5:] == ["–", "–"]


def test_calm_stands_beside_wild(inside):
    """Legends name the best and the largest rate; a diverged run is never the best."""
    figures = {figure.name: figure.svg for figure in inside.figures}
    names = ("logits", "gradients", "heads", "reads", "key-mixing", "value-mixing")
    assert list(figures) == [f"inside-{name}-constant" for name in names]
    titles = re.findall(r">(\w+ \([\d.]+ / [\d.]+\))<", figures["inside-logits-constant"])
    assert titles == [f"{arm} (0.001 / 1)" for arm in ("transformer", "mea", "groupnorm")]
    assert "mea (0.001 / 1)" in figures["inside-key-mixing-constant"]
    assert "groupnorm" not in figures["inside-key-mixing-constant"]


def test_the_section_has_it_once_for_every_schedule(runs):
    decayed = [looked_into(arm, 1e-3, schedule="wsd") for arm in ARMS]
    (section,) = sections([*runs[:2], *decayed[:2]])
    headings = [p.heading for p in section.parts if p.heading.startswith("Attention diagnostics")]
    assert headings == ["Attention diagnostics (constant schedule)", "Attention diagnostics (wsd schedule)"]
    names = [figure.name for p in section.parts for figure in p.figures]
    assert len(names) == len(set(names))
