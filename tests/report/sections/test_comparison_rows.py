"""The table of methods: order, digits, what is absent, and that it fits a terminal."""

import io

import pytest
from rich.console import Console

from mea.records import make_record
from mea.report import rows, terminal_table
from mea.report.sections.comparison_figures import figures
from mea.report.sections.comparison_rows import cells, lowest, with_error


def printed(records, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(terminal_table(records))
    return console.file.getvalue()


def test_uncompressed_first_then_best_to_worst(run):
    found = rows(run())
    assert [row.name for row in found] == [
        "uncompressed",
        "post_rope",
        "pre_rope",
        "gram",
        "svd",
    ]


def test_cells_go_with_the_header(run):
    titles, lines = cells(rows(run()))
    assert dict(zip(titles, lines[1], strict=True)) == {
        "method": "post_rope",
        "wikitext-2-test perplexity": "35.4 ± 1.4",
        "technical perplexity": "20.0 ± 0.8",
        "ratio": "1.53 ± 0.02",
        "cache bytes per token": "23,040",
        "decode ms per token": "61.2",
        "time ratio": "0.85 (0.84-0.87)",
        "compressed in": "42 s",
    }
    titles, lines = cells(rows(run()), brief=True)
    assert {len(line) for line in lines} == {len(titles)}


def test_columns_of_which_nothing_was_measured_are_left_out(one):
    titles, lines = cells(rows([one("svd", 2.0, decode={}), one("none", 1.0, decode={})]))
    assert titles[-2:] == ["cache bytes per token", "compressed in"]
    assert [line[-1] for line in lines] == ["–", "42 s"]


def test_terminal_table_fits_80_columns(run):
    text = printed(run(), 80)
    assert "…" not in text
    for number in ("1.53±0.02", "1.94±0.02", "2.71±0.03", "1,106±13", "25,668", "23,040", "46,080", "61.2"):
        assert number in text


def test_missing_results_are_shown_as_absent(one):
    record = one("svd", 2.0, texts={}, cache={}, decode={}, compress_seconds=None)
    assert printed([record, one("none", 1.0)], 100).count("–") >= 7


def test_other_records_are_left_out(run, one):
    other = make_record("speed", {})
    assert len(rows([other, *run()])) == 5
    with pytest.raises(ValueError, match=r"no record of the kind 'comparison' among 1 \(speed\)"):
        rows([other])


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1.5274, 0.0183, "1.53 ± 0.02"),
        (1.5274, 0.0018, "1.527 ± 0.002"),
        (1106.4, 13.2, "1,106 ± 13"),
        (23.24, 0.93, "23.2 ± 0.9"),
        (1.5, None, "1.50"),
        (25_668.3, 0.0, "25,668"),
        (None, None, "–"),
    ],
)
def test_digits_follow_the_error(value, error, text):
    assert with_error(value, error) == text


def test_time_of_the_uncompressed_model_from_the_runs_of_the_others(one):
    compressed = one("post_rope", 1.5)
    compressed["samples"]["decode_seconds"] = {"uncompressed": [0.07, 0.08, 0.09], "post_rope": [0.06, 0.06, 0.07]}
    _, (plain, other) = cells(rows([compressed, one("none", 1.0, decode=None)]))
    assert plain[-3:] == ["80.0", "1", "–"]
    assert other[-3:-1] == ["61.2 (beside 80.0)", "0.85 (0.84-0.87)"]


def test_variants_of_a_method_go_by_their_label(one):
    """Long names are wrapped in the terminal; numbers never are."""
    records = [one("none", 1.0)]
    for label, ratio in (
        ("paper's svd, 2 key heads and 1 value head", 2.0),
        ("paper's svd, 1 key and 2 value heads", 3.0),
    ):
        records.append(one("svd", ratio))
        records[-1]["config"]["label"] = label
    found = rows(records)
    assert [row.series for row in found[1:]] == [records[1]["config"]["label"], records[2]["config"]["label"]]
    text = printed(records, 80)
    assert "…" not in text
    assert "2.00±0.02" in text


def test_names_tell_the_size_where_there_are_several(one):
    found = rows([one("none", 1.0), one("post_rope", 1.5), one("post_rope", 2.2, keep=0.25)])
    assert [row.name for row in found] == ["uncompressed", "post_rope, 50 %", "post_rope, 25 %"]


def test_draws_of_one_method_are_told_apart(one):
    draws = [one("joint", 1.1) | {"seeds": {"calibration": seed}} for seed in (0, 1)]
    assert [row.name for row in rows(draws)] == ["joint, seed of calibration 0", "joint, seed of calibration 1"]
    assert [row.name for row in rows([one("joint", 1.1)] * 2)] == ["joint, 1", "joint, 2"]


def test_the_bits_of_each_series_are_drawn_once_at_the_size_nearest_to_a_fifth(run):
    records = run()
    for record, keep in zip(records[1:], (0.28, 0.2, 0.14, 0.5), strict=True):
        record["config"] |= {"keep": keep, "series": "packed", "tiers": [[[0, 2, 6], [0, 0, 4]], None], "numbers": 16}
    chosen = next(row.name for row in rows(records) if row.record["config"]["keep"] == 0.2)
    names = [figure.name for figure in figures(rows(records))]
    assert [name for name in names if name.startswith("bits-")] == [f"bits-{chosen}"]


def test_ratios_of_continuations_alone_share_no_first_place(run):
    """A press is scored on continuations alone: its large error made it tie with whatever was best."""
    records = run()
    score = {"perplexity": 30.0, "standard_error": 1.0, "ratio": 1.5, "ratio_standard_error": 9.0}
    records[1]["results"] = {"continuations": {"wikitext-2-test": score}, "cache": {"bytes_per_token": 9.0}}
    records[1]["config"] |= {"label": "kvpress X", "method": "kvpress X"}
    assert "kvpress X" not in [row.name for row in lowest(rows(records))]
