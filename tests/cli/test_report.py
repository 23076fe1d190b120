"""``mea report`` writes what the records hold, in every form asked for, and answers mistakes with one line."""

import pytest

from mea.records import make_record, write_record
from mea.report.render import html
from mea.scaling import FitSettings, fit_records
from synthetic_runs import sweep


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("sweep"), sweep(seeds=2)
    for index, record in enumerate(found):
        write_record(folder / "records" / f"{index:02}.json", record)
    write_record(folder / "fit.json", fit_records(found, FitSettings(draws=200)))
    return folder


def test_page_markdown_and_csv(mea, runs, tmp_path):
    paths = [tmp_path / "new" / name for name in ("r.html", "README.md", "r.csv")]
    options = zip(("--out", "--markdown", "--csv"), paths, strict=True)
    result = mea("report", runs, "--title", "Rates & variants", *(part for option in options for part in option))
    assert result.exit_code == 0, result.output
    html, markdown, table = (path.read_text() for path in paths)
    assert "<title>Rates &amp; variants</title>" in html
    assert f"mea report {runs.name} --out r.html" in html
    assert str(tmp_path) not in html
    assert "### Differences between variants" in markdown
    assert (tmp_path / "new" / "figures" / "rates-constant.svg").is_file()
    assert "Learning rates,b,best learning rate,0.01" in table
    assert [str(path) in result.stdout for path in paths] == [True] * 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("other.json", "--csv", "x.csv"), "no record that has a section among 1 (kinds: speed"),
        (("other.json",), "nothing to write: give --out, --markdown or --csv"),
        (("gone", "--csv", "x.csv"), "there is nothing at gone"),
    ],
)
def test_mistakes_are_told_in_one_line(mea, tmp_path, monkeypatch, names, message):
    monkeypatch.chdir(tmp_path)
    write_record("other.json", make_record("speed", {}))
    result = mea("report", *names)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "x.csv").exists()


def test_a_missing_extra_is_told_before_any_work(mea, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(html, "find_spec", lambda name: None)
    result = mea("report", runs, "--csv", tmp_path / "x.csv")
    assert "pip install 'mea[report]'" in result.stderr
