"""Markdown between marks, figures beside it, CSV; sections only for what is there; where records are looked for."""

import csv
import io
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from mea.records import make_record, write_record
from mea.report import as_csv, find_records, make_sections, write_markdown, write_report
from mea.report.formatting import with_error, with_interval
from mea.report.parts import Figure, Part, Section, Table
from mea.report.registry import REGISTRY
from mea.report.render.markdown import END, FIGURES, START, table_markdown
from mea.report.render.terminal import TerminalTable
from mea.report.sections.scaling_fit import _only_interval
from synthetic_runs import sweep

SVG = '<svg role="img" viewBox="0 0 1 1"><path stroke="currentColor"/></svg>'


def section(figure="curve A", cell="1|2"):
    table = Table(["name", "a\nvalue"], [["x", "3"], ["y", cell]], "What it is.", best=(1,))
    parts = [Part("First", "Text.", [("3", "things")], table, [Figure(figure, SVG, "A curve.")], [("x", "one\ntwo")])]
    return Section("All", parts)


def test_markdown_is_written_between_the_marks_only(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"# Mine\n\n{START}\nold\n{END}\n\nMore.\n")
    write_markdown([section()], path)
    text = path.read_text()
    assert text.startswith(f"# Mine\n\n{START}\n\n## All\n\n### First\n\n- **3** things\n")
    assert text.endswith(f"\n{END}\n\nMore.\n")
    assert "old" not in text
    for line in ("| name | a value |", "| --- | ---: |", "| x | 3 |", "| **y** | **1\\|2** |", "> one\n> two\n"):
        assert line in text
    again = path.read_bytes()
    write_markdown([section()], path)
    assert path.read_bytes() == again


def test_what_a_model_said_stays_text(tmp_path):
    said = f"<b>loud</b>\n{END}"
    path = write_markdown([Section("A", [Part(quotes=[("m", said)])])], tmp_path / "README.md")
    assert "> &lt;b>loud&lt;/b>\n" in path.read_text()
    before = path.read_bytes()
    assert write_markdown([Section("A", [Part(quotes=[("m", said)])])], path).read_bytes() == before


def test_figures_are_files_that_stand_alone(tmp_path):
    path = write_markdown([section()], tmp_path / "new" / "README.md")
    assert f"![A curve.]({FIGURES}/curve-a.svg)" in path.read_text()
    figure = path.parent / FIGURES / "curve-a.svg"
    assert ElementTree.parse(figure).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert "currentColor" not in figure.read_text()


def test_figures_no_longer_wanted_go_and_others_stay(tmp_path):
    path = write_markdown([section("old")], tmp_path / "README.md")
    (tmp_path / FIGURES / "mine.svg").write_text(SVG)
    write_markdown([section("new")], path)
    assert sorted(file.name for file in (tmp_path / FIGURES).iterdir()) == ["mine.svg", "new.svg"]


@pytest.mark.parametrize("text", ["# Mine\n", f"{START}\n", f"{END}\n{START}\n", f"{START}\n{END}\n{START}\n{END}\n"])
def test_a_file_without_one_place_is_left_alone(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="must contain these two lines exactly once"):
        write_markdown([section()], path)
    assert path.read_text() == text
    assert not (tmp_path / FIGURES).exists()


def test_csv_has_a_line_for_every_number():
    rows = list(csv.reader(io.StringIO(as_csv([section()]))))
    assert rows[0] == ["section", "table", "row", "column", "value"]
    assert rows[1:] == [["All", "First", "x", "a value", "3"], ["All", "First", "y", "a value", "1|2"]]


def test_sections_only_for_what_is_there(run):
    runs, needle = sweep(seeds=1), make_record("long context", {"model": "m"}, results={"cells": []})
    headings = [found.heading for found in make_sections([needle, *run(), *runs])]
    assert headings == ["Pretraining: 1m, 4 million tokens", "Half the KV cache of SmolLM2-135M", "Long context"]
    assert len(make_sections(run())) == 1
    with pytest.raises(ValueError, match=r"no record that has a section among 1 \(kinds: speed; shown are pre"):
        make_sections([make_record("speed", {})])


def test_figures_of_several_sizes_are_several_files(tmp_path):
    records = [
        *sweep(seeds=1),
        *(record | {"config": record["config"] | {"preset": "3m"}} for record in sweep(seeds=1)),
    ]
    write_markdown(make_sections(records), tmp_path / "README.md")
    names = sorted(file.name for file in (tmp_path / FIGURES).iterdir())
    assert names == [f"{number}-loss-{arm}-constant.svg" for number in (1, 2) for arm in "ab"]


def test_kinds_belong_to_one_section_each():
    kinds = [kind for shown, _ in REGISTRY for kind in shown]
    assert len(set(kinds)) == len(kinds)


def test_a_page_of_several_sections_leads_to_them(run, tmp_path):
    records = [*run(), *sweep(seeds=1), make_record("speed", {})]
    text = write_report(records, tmp_path / "r.html", regenerate="mea report x").read_text()
    assert '<a href="#section-2">Half the KV cache of SmolLM2-135M</a>' in text
    assert text.count("<section id=") == 2
    assert "1 of the kind speed" in text
    ids = [piece.split('"')[0] for piece in text.split(' id="')[1:]]
    assert len(set(ids)) == len(ids)


def test_records_are_found_below_and_once(run, tmp_path):
    first, second = run()[:2]
    write_record(tmp_path / "b" / "one.json", first)
    write_record(tmp_path / "a.json", second)
    write_record(tmp_path / ".hidden" / "no.json", second)
    (tmp_path / "b" / "config.json").write_text("{}")
    assert find_records([tmp_path, tmp_path / "a.json"]) == [second, first]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((1.23456, [1.2, 1.3]), "1.235 (1.200 to 1.300)"),
        ((0.5, [-0.1, 1.0], 1, "+", " %"), "+0.5 % (-0.1 to +1.0)"),
        ((123456.0, [0.0, 2e10], -2), "1.2e5 (0.0e0 to 2.0e10)"),
        ((1.5e-7, [], -2), "1.5e-7"),
        ((2.0, []), "2.000"),
        ((None, None), "–"),
        ((-0.00001, [-0.5, 0.00001], 4, "+"), "0.0000 (-0.5000 to 0.0000)"),
    ],
)
def test_intervals_in_words(arguments, text):
    assert with_interval(*arguments) == text


def test_no_number_is_minus_zero():
    assert with_error(-0.001, None) == "0.00"
    assert with_error(-0.001, 0.5) == "0.0 ± 0.5"
    assert _only_interval([-0.00001, 0.5]) == "+0.0000 to +0.5000"


def test_an_empty_cell_stays_empty_in_a_line_that_stands_out():
    table = Table(["name", "value", "p"], [["x", "3", ""]], "What it is.", best=(0,))
    assert table_markdown(table).splitlines()[-1] == "| **x** | **3** |  |"


def test_names_of_variants_are_whole_in_a_narrow_terminal():
    """Both differential variants were "differe…" once, and a small gain looked like none."""
    header = ["variant", "rate", "α", "D_c", "L_0", "residual", "predicted loss"]
    values = ["0.0025 (edge)", "0.13 (0.12 to 0.20) *", "3.8e11 (3.4e8 to 5.4e11)", "0.00 (0.00 to 1.78)"]
    names = ["transformer", "differential_v1", "groupnorm_small_gain"]
    lines = [[name, *values, "0.22 %", "3.25 (3.20 to 3.39)"] for name in names]
    console = Console(file=io.StringIO(), width=80)
    console.print(TerminalTable(Part("Fits", table=Table(header, lines))))
    printed = console.file.getvalue()
    for whole in ("transformer ", "differential_ ", "v1 ", "groupnorm_ ", "small_gain ", "(edge)", "3.4e8…5.4e11"):
        assert whole in printed


def test_words_stay_whole_beside_a_choice_of_variant_and_rate():
    """The columns of variant and schedule once had a letter a line."""
    header = ["variant", "schedule", "cells", "rank correlation", "best at constant rate", "best after decay", "gain"]
    choices = ["mea_small_gain at 0.0025", "groupnorm_small_gain at 0.0063"]
    line = ["all arms", "wsd", "4", "0.80 (0.40 to 1.00)", *choices, "0.182"]
    console = Console(file=io.StringIO(), width=80)
    console.print(TerminalTable(Part("Decay", table=Table(header, [line], texts=2))))
    printed = console.file.getvalue()
    for whole in ("variant ", "schedule ", "all arms ", "0.40…1.00 ", "mea_small_", "small_gain ", "at 0.0063 "):
        assert whole in printed


def test_a_part_without_a_table_has_nothing_for_a_terminal():
    with pytest.raises(ValueError, match="Words has no table"):
        TerminalTable(Part("Words"))


@pytest.mark.parametrize(
    "path", ["figures/../../victim.txt", "figures/../victim.svg", "figures/victim.txt", "../victim.svg"]
)
def test_only_figures_in_their_folder_are_removed(tmp_path, path):
    """An old page that named a file outside of the folder once had that file deleted."""
    folder = tmp_path / "page"
    (folder / FIGURES).mkdir(parents=True)
    victim = (folder / path).resolve()
    victim.write_text("mine")
    (folder / "README.md").write_text(f"{START}\n![a]({path})\n{END}\n")
    write_markdown([section()], folder / "README.md")
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("name", ["../../escape", "a/b", "..", "x" * 300, "\x1b[31m", "é" * 200])
def test_figures_of_any_name_are_files_of_their_folder(tmp_path, name):
    write_markdown([section(name)], tmp_path / "page" / "README.md")
    assert len(list((tmp_path / "page" / FIGURES).iterdir())) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page"]
    write_markdown([section("other")], tmp_path / "page" / "README.md")
    assert [path.name for path in (tmp_path / "page" / FIGURES).iterdir()] == ["other.svg"]


@pytest.mark.parametrize("cell", ["=1+1", "@SUM(A1)", "+cmd|' /C calc'!A0", "-2+3", "\t=1", "-1.5 (=A1 to 2)"])
def test_a_cell_is_no_formula_in_a_spreadsheet(cell):
    table = Table(["name", "value"], [[cell, cell]])
    (_, row) = csv.reader(io.StringIO(as_csv([Section(cell, [Part(cell, table=table)])])))
    assert all(value in (f"'{cell}", "value") for value in row)


@pytest.mark.parametrize(
    "cell", ["-1.5", "+0.5 %", "-1,234.5", "-2.0 ± 0.4", "-1.5e-7", "+1.23 (+0.20 to +2.20)", "-1 to +2"]
)
def test_numbers_with_a_sign_stay_numbers_in_csv(cell):
    assert next(csv.reader(io.StringIO(as_csv([Section("A", [Part(table=Table(["a", "b"], [["x", cell]]))])])))) != []
    assert as_csv([Section("A", [Part(table=Table(["a", "b"], [["x", cell]]))])]).rstrip('\n"').endswith(f"{cell}")
    assert "'" not in as_csv([Section("A", [Part(table=Table(["a", "b"], [["x", cell]]))])])


def test_names_are_text_in_markdown(tmp_path):
    """Names once made links, images, headings and HTML of a README."""
    name = "a\n# b ![x](http://y) [l]: <img> `c` *d* _e_ \x1b[31m"
    parts = [Part(name, name, [(name, name)], Table([name], [[name]], name), [Figure("f", SVG, name)], [(name, name)])]
    text = write_markdown([Section(name, parts)], tmp_path / "README.md").read_text()
    assert "](http" not in text
    assert "]: " not in text
    assert "<img" not in text
    assert "\x1b" not in text
    assert not [line for line in text.splitlines() if line.startswith("# ")]
    for mark in ("`", "*d", "d*", " _e", "e_"):
        assert mark not in text.replace(f"\\{mark}", "").replace("\\*d\\*", "").replace("\\_e\\_", "")
