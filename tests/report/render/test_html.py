"""The page shows every method and its numbers, loads nothing, and keeps other people's text harmless."""

import re
from html.parser import HTMLParser

import pytest

from mea.report import write_report
from mea.report.render import html
from mea.report.render.html import render
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
        "position",
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
    assert "said position <b>loudly</b>." in parsed.text


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
