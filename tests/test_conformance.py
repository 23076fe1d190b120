"""docs/conformance.md is what its record says, and a sample of its cells comes out as recorded."""

import importlib.util
from pathlib import Path

import pytest

from mea.records import read_record

SCRIPT = Path(__file__).parent.parent / "scripts/conformance.py"
spec = importlib.util.spec_from_file_location("conformance", SCRIPT)
assert spec
assert spec.loader
conformance = importlib.util.module_from_spec(spec)
spec.loader.exec_module(conformance)

WAYS = [way for way in conformance.WAYS if way != "loaded without this package"]  # of all models in another process
# Every way once, and every architecture and form several times.
SAMPLE = [(way, conformance.KINDS[i % 7], conformance.FORMS[i % 6]) for i, way in enumerate(WAYS)]


@pytest.fixture(scope="module")
def record():
    return read_record(conformance.RECORD)


def test_the_page_is_what_the_record_says(record):
    assert conformance.PAGE.read_text(encoding="utf-8") == conformance.page(record)


def test_every_cell_is_right_or_refused(record):
    cells = record["results"]["cells"]
    assert list(cells) == list(conformance.WAYS)
    for way, by_form in cells.items():
        assert list(by_form) == list(conformance.FORMS)
        for form, found in by_form.items():
            assert set(found) == set(conformance.KINDS), (way, form)
            for kind, said in found.items():
                assert said in ("ok", "–") or said.startswith("refused: "), (way, form, kind)


@pytest.mark.parametrize(("way", "kind", "form"), SAMPLE)
def test_a_cell(record, way, kind, form):
    assert conformance.outcome(way, kind, form) == record["results"]["cells"][way][form][kind]
