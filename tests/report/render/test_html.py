"""The page shows every method and its numbers, loads nothing, and keeps other people's text harmless."""

import re
import time
from html.parser import HTMLParser

import pytest

from mea.report import make_sections, write_report
from mea.report.parts import Part, Section
from mea.report.render import html
from mea.report.render.html import render
from mea.report.render.svg import _line_by_line, axes_of_a_figure, legend
from mea.report.sections.comparison_figures import loss_by_layer, perplexity_against_bytes, ratio_by_position
from mea.report.sections.comparison_rows import rows


class Page(HTMLParser):
    """Tags, attributes and visible text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_every_method_with_its_numbers(run):
    text = Page(render(run(), regenerate="make something")).text
    for value in (
        "post_rope",
        "svd",
        "uncompressed",
        "1.53 ± 0.02",
        "1,106 ± 13",
        "23,040",
        "46,080",
        "42 s",
    ):
        assert value in text
    for value in (
        "Half the KV cache of SmolLM2-135M",
        "make something",
        "× 1.53",
        "calibration_tokens 12288",
        "seed of",
    ):
        assert value in text
    assert "Outside the axes: svd (1,118 to 1,197 times)." in " ".join(text.split())


def test_nothing_is_loaded_from_elsewhere(run):
    text = render(run())
    parsed = Page(text)
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", text)
    assert not {"script", "link", "iframe", "img", "object"} & set(parsed.tags)
    targets = [value for name, value in parsed.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith("#") for value in targets)


def test_ids_in_figures_are_not_shared(run):
    """Figures share a page: a marker defined in one must not be drawn in another."""
    parsed = Page(render(run()))
    targets = {value[1:] for name, value in parsed.attributes if name == "xlink:href"}
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert targets
    assert all(ids.count(target) == 1 for target in targets)


def test_text_of_a_model_stays_text(run):
    parsed = Page(render(run()))
    assert "said post_rope <b>loudly</b>." in parsed.text


def test_figures_have_axes_with_units_and_take_the_page_colour(run):
    found = rows(run())
    drawn = [figure(found).svg for figure in (perplexity_against_bytes, ratio_by_position, loss_by_layer)]
    labels = ["KiB per token", "position in the text (tokens)", "nats per token"]
    for svg, label in zip(drawn, labels, strict=True):
        assert svg.startswith("<svg")
        assert label in svg
        assert "currentColor" in svg
        assert "#010203" not in svg


def test_same_records_give_the_same_page(run):
    records = run()
    assert render(records) == render(records)


def test_figures_without_their_numbers_are_left_out(one):
    bare = {"positions": [], "layers": None, "cache": {}, "continuation": None}
    text = render([one("none", 1.0, **bare), one("svd", 2.0, **bare)])
    assert "<svg" not in text
    assert "continued" not in text


def test_a_quantised_cache_has_no_line_of_layers_of_its_own(one):
    stored = one("svd", 2.0)
    stored["config"] |= {"label": "in bits", "bits": 4}
    drawn = loss_by_layer(rows([one("none", 1.0), one("svd", 2.0), stored]))
    assert "svd" in drawn.svg
    assert "in bits" not in drawn.svg


def test_single_compressed_model_without_the_original(one):
    assert "svd" in render([one("svd", 2.0)])


def test_writes_the_file_whole(run, tmp_path):
    path = write_report(run(), tmp_path / "new" / "report.html", title="A & B")
    assert "<title>A &amp; B</title>" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_missing_extra_is_named(run, monkeypatch):
    monkeypatch.setattr(html, "find_spec", lambda name: None if name == "jinja2" else object())
    with pytest.raises(ImportError, match=r"needs jinja2: pip install 'mea\[report\]'"):
        render(run())


def test_control_bytes_and_odd_labels_do_no_harm(one):
    """Escape bytes once stood in the page; "$" in a label was read as mathematics."""
    odd = one("svd", 2.0)
    odd["config"]["label"] = "\x1b[31m$x_{$ <b>&\x00"
    page = render([one("none", 1.0), odd])
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)
    assert "[31m$x_{$ &lt;b&gt;&amp;" in page


def test_long_labels_take_no_time(one):
    """Labels of tens of thousands of letters once took half a minute of layout."""
    long = one("svd", 2.0)
    long["config"]["label"] = "Ω <b> $ " * 5_000
    start = time.process_time()
    page = render([one("none", 1.0), long])
    assert time.process_time() - start < 10
    assert "…" in page


def test_a_long_page_has_a_list_of_contents(run):
    many = [Part(f"Question {index}", "Answer.") for index in range(8)]
    page = render(run(), sections=[Section("All", many)])
    assert '<a href="#part-1-8">Question 7</a>' in page
    assert 'id="part-1-8">Question 7</h2>' in page
    assert "<nav>" not in render(run(), sections=[Section("All", many[:2])])


def test_a_tie_is_not_headlined_as_a_win(one):
    """Two methods whose ratios differ by less than their errors; a third is far off."""
    (section,) = make_sections([one("none", 1.0), one("gram", 1.53), one("post_rope", 1.527), one("svd", 3.0)])
    numbers = section.parts[0].numbers
    assert numbers[0][0] == "2 methods"
    assert numbers[0][1].endswith("within two standard errors: post_rope, gram")
    assert section.parts[1].table.best == (1, 2)


def test_legends_are_read_line_by_line():
    assert [_line_by_line(7, 3)[i] for i in range(3)] == [0, 3, 6]
    figure, axes = axes_of_a_figure()
    for index in range(7):
        axes.plot([0, 1], [0, index], label=f"{10.0**index:g}")
    legend(figure, axes)
    (drawn,) = figure.legends
    columns = drawn._ncols
    names = [text.get_text() for text in drawn.get_texts()]
    rows = -(-7 // columns)
    heights = [rows if column < 7 - (rows - 1) * columns or 7 % columns == 0 else rows - 1 for column in range(columns)]
    starts = [sum(heights[:column]) for column in range(columns)]
    read = [names[starts[c] + r] for r in range(rows) for c in range(columns) if r < heights[c]]
    assert read == [f"{10.0**index:g}" for index in range(7)]


def test_the_first_word_that_differs_from_the_first_quote_is_marked():
    part = Part(quotes=[("a", "one two three"), ("b", "one <2> three"), ("c", "one two")])
    assert part.differing() == [("a", "one two three", "", ""), ("b", "one", "<2>", "three"), ("c", "one two", "", "")]
    page = render([], sections=[Section("A", [part])])
    assert "<p>one <mark>&lt;2&gt;</mark> three</p>" in page
    assert page.count("<mark>") == 1
