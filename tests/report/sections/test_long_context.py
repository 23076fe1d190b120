"""Long contexts on the page: maps by depth, scores by length, loss by position, two models compared."""

import io

import pytest
from rich.console import Console

from mea.records import make_record
from mea.report import as_csv, make_sections
from mea.report.sections.long_context import context_tables


def score(mean, error=0.1):
    return {"mean": mean, "standard_error": error}


def cell(tokens, depth, written, preferred=1.0, task="needle"):
    found = {"task": task, "tokens": tokens, "depth": depth, "items": 4, "questions": 4, "chance": 0.125}
    found |= {"context": tokens - 10, "cache_bytes": tokens * 2**10}
    return found | {"exact": score(written), "choice": score(preferred), "logprob": score(-2.0)}


@pytest.fixture
def record():
    cells = [cell(1024, 0.0, 0.75), cell(1024, 1.0, 0.25, 0.5), cell(2048, 0.0, 0.0, task="multi-key")]
    values = {"exact": [0, 1, 0, 1], "choice": [1, 1, 1, 0], "logprob": [-1.0, -2.0, -2.0, -3.0]}
    samples = {"needle": {"1024": values}, "multi-key": {"2048": values}, "position": {"1024": [3.0, 3.1]}}
    ranges = [{"start": 0, "stop": 1024, "perplexity": 20.0, "standard_error": 1.0, "tokens": 2046}]
    config = {"label": "half", "cache_bits": 4, "position_text": "wikitext-2-test"}
    return make_record("long context", config, results={"cells": cells, "positions": ranges}, samples=samples)


@pytest.fixture
def paired():
    found = {"items": 8, "difference": -0.125, "interval": [-0.3, 0.05], "p_value": 0.25}
    lengths = [{"task": "needle", "tokens": 1024, "score": "choice"} | found]
    lengths += [{"task": "needle", "tokens": 1024, "score": "logprob"} | found | {"p_value": None}]
    results = {"lengths": lengths, "tasks": {"needle": {"choice": found}}, "positions": [{"stop": 1024} | found]}
    return make_record("paired long context", {"first": "half", "second": "whole"}, results=results)


def test_maps_scores_and_losses(record):
    (section,) = make_sections([record])
    maps, scores, positions = section.parts
    assert [figure.caption.split(":")[0] for figure in maps.figures] == [
        "half, 4-bit cache, one fact",
        "half, 4-bit cache, one of eight facts",
    ]
    for text in (">75 · 100<", ">25 · 50<", "1,024", "100 %"):
        assert text in maps.figures[0].svg
    expected = ["half, 4-bit cache", "needle", "1,024", "4", "50 ± 29", "75 ± 25", "12", "-2.0 ± 0.4", "1.0"]
    assert scores.table.lines[0] == expected
    assert positions.table.lines == [["half, 4-bit cache", "20.0 ± 1.0"]]
    assert '"half, 4-bit cache / needle / 1,024",preferred,75 ± 25' in as_csv([section])


def test_a_single_prompt_has_no_error(record):
    record["samples"] = {"needle": {"1024": {"exact": [1], "choice": [1], "logprob": [-1.0]}}}
    (section,) = make_sections([record])
    assert section.parts[1].table.lines[0][4:6] == ["100", "100"]


def test_two_models(record, paired):
    (section,) = make_sections([record, paired])
    table, losses = (part.table for part in section.parts[-2:])
    assert table.lines[0] == ["needle", "preferred", "1,024", "8", "-12.5 (-30.0 to +5.0)", "0.25"]
    assert table.lines[1][4:] == ["-0.125 (-0.300 to +0.050)", "–"]
    assert table.lines[2][2:5] == ["all", "", "-12.5 (-30.0 to +5.0)"]
    assert losses.lines == [["0 to 1,024", "8", "-0.125 (-0.300 to +0.050)"]]


def test_tables_fit_a_terminal(record, paired):
    console = Console(file=io.StringIO(), width=80)
    for table in context_tables([record, paired]):
        console.print(table)
    text = console.file.getvalue()
    for value in ("50 ± 29", "75 ± 25", "-2.0 ± 0.4", "MiB", "+5.0", "McNemar"):
        assert value in text
