"""Every record of the repository renders in every form, and its tables fit 80 columns with whole words."""

import io
import json
import re
import time
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from mea.report import TerminalTable, make_sections, terminal_table, write_markdown, write_report
from mea.report.registry import REGISTRY
from mea.report.render.markdown import as_csv
from mea.report.schema import check_fields
from mea.report.sections.compression import compression_table, perplexity_table
from mea.report.sections.long_context import context_tables
from mea.report.sections.profile import profile_table
from mea.report.sections.scaling_fit import fit_parts
from mea.report.sections.tasks import task_tables

ROOT = Path(__file__).parents[2]
SHOWN = {kind for kinds, _ in REGISTRY for kind in kinds}
DRAWN = {"smollm2", "too_large"}  # to draw the figures of all experiments takes half a minute
EMPTY_SVG = '<svg width="1" height="1" version="1.1"></svg>'


@pytest.fixture(scope="module")
def records():
    """Experiment -> its records with checked fields, read without the checks of `mea.records`, which take long here."""
    found = {}
    for path in [*sorted(ROOT.glob("experiments/*/**/*.json")), *ROOT.glob("benchmarks/**/*.json")]:
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and "kind" in record and "samples" in record:
            check_fields(record, str(path))
            found.setdefault(path.relative_to(ROOT).parts[1], []).append(record)
    return found


def test_every_record_renders(records, tmp_path, monkeypatch):
    assert len([record for found in records.values() for record in found]) > 400
    rendered = set()
    for name, found in records.items():
        kinds = {record["kind"] for record in found} & SHOWN
        if not kinds:
            continue
        with monkeypatch.context() as patch:
            if name not in DRAWN:
                patch.setattr(Figure, "savefig", lambda _, file, **options: file.write(EMPTY_SVG))
            sections = make_sections(found)
        page = write_report(found, tmp_path / name / "page.html", sections=sections).read_text(encoding="utf-8")
        text = write_markdown(sections, tmp_path / name / "README.md").read_text(encoding="utf-8")
        assert len(as_csv(sections).splitlines()) > 1
        for section in sections:
            assert section.heading in page
            assert section.heading in text
        rendered |= kinds
    assert rendered >= {"pretraining", "fit", "comparison", "task", "paired tasks", "long context"}


def tables(found):
    """What the commands print of these records."""
    by_kind = {}
    for record in found:
        by_kind.setdefault(record["kind"], []).append(record)
    printed = [*task_tables(found), *context_tables(found)]
    for model in dict.fromkeys(record["config"]["model"] for record in by_kind.get("comparison", [])):
        printed.append(terminal_table([r for r in by_kind["comparison"] if r["config"]["model"] == model]))
    for record in found:
        if record["kind"] == "fit":
            printed += map(TerminalTable, fit_parts(record))
        elif record["kind"] == "perplexity":
            printed.append(perplexity_table(record))
        elif record["kind"] == "profile":
            printed.append(profile_table(record))
        elif record["kind"] == "compression":
            printed.append(compression_table(record, "out"))
    return printed


def test_tables_fit_80_columns_and_break_no_word(records):
    count = 0
    for found in records.values():
        for table in tables(found):
            console = Console(file=io.StringIO(), width=80)
            console.print(table)
            text = console.file.getvalue()
            assert max(map(len, text.splitlines())) <= 80, text
            for cell in (cell for row in (table.table.header, *table.table.lines) for cell in row):
                assert all(word in text for word in words(cell)), text
            count += 1
    assert count > 60


def words(cell):
    """What has to stand in one piece: words, numbers with their intervals, long names up to ``_`` and ``-``."""
    cell = re.sub(r" \((\S+) to (\S+)\)", r" \1…\2", cell)
    return [piece for word in cell.split() for piece in re.split(r"(?<=\w{9}_)(?=\w)|(?<=[a-zA-Z]{5}-)(?=\w)", word)]


def test_a_record_that_no_section_shows_is_of_a_known_kind(records):
    """A new kind is either shown or named here."""
    others = {"allocation", "cache_bits", "calibration_text", "four_heads"}
    others |= {
        "math or data",
        "reference",
        "token counts",
        "decode_attention",
        "decode_gpu",
        "decode_model",
        "serving_capacity",
        "training_step",
        "start",
    }
    assert {record["kind"] for found in records.values() for record in found} <= SHOWN | others


def test_labels_of_any_length_are_escaped_and_take_no_time(tmp_path):
    """Figures once took minutes of processor time to set such labels; here the page takes 2 seconds."""
    source = (ROOT / "experiments/learning_rate/records/runs/transformer-0.0025-0.json").read_text(encoding="utf-8")
    records = [json.loads(source) for _ in range(10)]
    for number, record in enumerate(records):
        record["config"]["arm"] = f"<b>&$\\frac{'x_' * 3000}{number}"
    began = time.process_time()
    page = write_report(records, tmp_path / "page.html").read_text(encoding="utf-8")
    assert time.process_time() - began < 20
    assert "<b>&" not in page
