"""Scores beside the published ones: said whose they are, averaged only where complete, to the right digits."""

import io

import pytest
from rich.console import Console

from mea.records import make_record
from mea.report.sections import tasks

PARAMETERS = 134_515_008


def score(label, task, mean=0.5, suite="zero-shot", limit=None, **metrics):
    metrics = {"acc": {"mean": mean, "standard_error": 0.01}} | metrics
    config = {"label": label, "task": task, "suite": suite, "parameters": PARAMETERS, "dtype": "float32"}
    return make_record("task", config | {"limit": limit}, results={"items": 1838, "metrics": metrics, "main": "acc"})


@pytest.fixture
def complete():
    means = dict(zip(tasks.TABLE_1.values(), (0.68, 0.22, 0.52, 0.35, 0.6, 0.25), strict=True))
    return [score("small", task, mean) for task, mean in means.items()]


@pytest.fixture
def paired():
    found = {"difference": 0.0123, "standard_error": 0.005, "interval": [0.002, 0.022], "items": 1838}
    item = found | {"p_value": 0.0312, "only_first": 40, "only_second": 18, "items_for_a_point": 3512}
    results = {"tasks": {"piqa": {"acc": item, "loss": item | dict.fromkeys(("p_value", "only_first", "only_second"))}}}
    return make_record("paired tasks", {"first": "plain", "second": "half"}, results=results | {"average": found})


def test_published_rows_are_marked_and_average_to_what_they_say():
    for row in tasks.PUBLISHED_1.values():
        assert sum(row[:-1]) / 6 == pytest.approx(row[-1], abs=0.006)
    table = tasks.table_1([score("small", "piqa")]).table
    assert all("published" in line[0] and tasks.SCALE_1 in line[1] for line in table.lines[:4])
    assert table.best == (4,)
    assert "published" not in table.lines[4][0]
    assert tasks.PAPER in table.note
    assert "another scale" in table.note


def test_our_row(complete):
    line = tasks.table_1(complete).table.lines[4]
    assert line[:3] == ["small", "135M, float32", "68.00 ± 1.00"]
    assert line[-1] == "43.67 ± 0.41"  # six errors of 1 point: 1 / sqrt 6


def test_tasks_in_different_dtypes_are_said_to_be(complete):
    complete[-1]["config"]["dtype"] = "bfloat16"
    assert tasks.table_1(complete).table.lines[4][1] == "135M, bfloat16 and float32"


def test_a_models_rows_stand_together_though_their_files_do_not():
    mixed = [score(*each) for each in (("half", "piqa"), ("whole", "piqa"), ("half", "winogrande"))]
    (section,) = tasks.sections(mixed)
    assert [tuple(line[:2]) for line in section.parts[1].table.lines] == [
        ("half", "piqa"), ("half", "winogrande"), ("whole", "piqa"),
    ]  # fmt: skip


def test_what_others_are_compared_with_stands_first(paired):
    (section,) = tasks.sections([score("a", "piqa"), score("half", "piqa"), score("plain", "piqa"), paired])
    assert [line[0] for line in section.parts[1].table.lines] == ["half", "a", "plain"]


def test_no_average_over_a_part(complete):
    line = tasks.table_1(complete[:-1]).table.lines[4]
    assert line[-2:] == ["–", "–"]


def test_a_limit_is_told():
    assert tasks.table_1([score("small", "piqa", limit=100)]).table.lines[4][1].endswith("first 100 rows")


def test_table_2_tells_how_many_tasks_stand_behind_a_number():
    records = [score("m", "aime25", 0.1, "math"), score("m", "gsm8k", 0.3, "math"), score("m", "sciq", 0.9, "science")]
    line = tasks.table_2(records).table.lines[-1]
    assert line[2:] == ["–", "90.00 [1 task]", "20.00 [2 tasks]", "–"]
    assert tasks.table_2([score("m", "piqa")]) is None
    assert tasks.table_1(records) is None


def test_differences_item_by_item(paired):
    part = tasks.differences(paired)
    assert part.heading == "plain against half"
    expected = ["piqa", "acc", "1,838", "+1.23 (+0.20 to +2.20)", "40 / 18", "0.031", "3,512"]
    assert part.table.lines[0] == expected
    assert part.table.lines[1][4:6] == ["– / –", "–"]
    assert part.table.lines[-1][:4] == ["average", "main", "", "+1.23 (+0.20 to +2.20)"]


def test_section_and_terminal(complete, paired):
    (section,) = tasks.sections([*complete, paired])
    headings = ["The paper's Table 1 and our models", "Scores", "plain against half"]
    assert [part.heading for part in section.parts] == headings
    console = Console(file=io.StringIO(), width=80)
    for found in tasks.task_tables([*complete, paired]):
        console.print(found)
    text = console.file.getvalue()
    assert "…" not in text.replace("+0.20…+2.20", "")
    for value in ("68.00 ± 1.00", "+1.23", "+0.20…+2.20", "3,512"):
        assert value in text


def test_numbers_are_whole_in_a_narrow_terminal():
    """Short values under long titles too: columns were once cut at the terminal's edge."""
    found = {"difference": 0.125, "standard_error": 0.3, "interval": [-0.75, 1.0], "items": 4}
    few = found | {"p_value": 0.5, "only_first": 1, "only_second": 0, "items_for_a_point": 52320}
    many = few | {"items": 10042, "p_value": 6.2e-130, "only_first": 1173, "only_second": 2655}
    for item in (few, many):
        results = {"tasks": {"arc_challenge": {"acc": item, "acc_norm": item}}, "average": found}
        console = Console(file=io.StringIO(), width=80)
        for table in tasks.task_tables([make_record("paired tasks", {"first": "a", "second": "b"}, results=results)]):
            console.print(table)
        wanted = f"{item['only_first']} / {item['only_second']}", f"{item['p_value']:.2g}"
        for value in ("+12.50", "-75.00…+100.00", "52,320", "McNemar's", *wanted):
            assert value in console.file.getvalue()
