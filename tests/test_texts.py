"""The shipped texts are what their README says, apart from each other, and a user's file gives a clear error."""

import gzip
import hashlib
import re
from functools import cache
from importlib.resources import files

import pytest

from mea.texts import NAMES, load_text

DATA = files("mea") / "data"


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@cache
def runs_of(name: str, length: int = 13) -> set[tuple[str, ...]]:
    found = words(load_text(name))
    return {tuple(found[i : i + length]) for i in range(len(found) - length + 1)}


def test_files_and_readme_state_the_same():
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    stated = dict(reversed(line.split()) for line in re.findall(r"^[0-9a-f]{64}  \S+$", readme, re.MULTILINE))
    actual = {f"{name}.txt.gz": hashlib.sha256((DATA / f"{name}.txt.gz").read_bytes()).hexdigest() for name in NAMES}
    assert stated == actual
    for name in NAMES:
        assert f"| `{name}` | {len(load_text(name)):,} |" in readme


def test_wikitext_is_the_well_known_file():
    digest = hashlib.sha256(load_text("wikitext-2-test").encode()).hexdigest()
    assert digest == "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"


@pytest.mark.parametrize("text", ["calibration", "encyclopaedic", "technical-valid"])
def test_nothing_tested_on_was_calibrated_or_chosen_on(text):
    """What is calibrated on is apart from every other text; technical-valid, to choose on, from what is tested on."""
    own = runs_of(text)
    assert len(own) > 5_000
    for name in set(NAMES) - {"calibration", "encyclopaedic", text}:
        assert own.isdisjoint(runs_of(name)), name


def test_every_part_of_the_calibration_text_is_mixed():
    """Windows are chosen by a seed: whichever they are, they hold documentation and code by their share."""
    text, between = load_text("calibration"), "\n\n\n"
    technical = ""
    for document in text.split(between):  # docstrings have their name above them
        mark = "x" if re.match(r"\s*def |\w+\n\n", document) else "."
        technical += mark * (len(document) + len(between))
    length = len(text) // 16
    for start in range(0, 16 * length, length):
        assert 0.1 < technical[start : start + length].count("x") / length < 0.3


def test_licences_of_the_packages_go_along():
    readme, licences = ((DATA / name).read_text(encoding="utf-8") for name in ("README.md", "LICENSES.txt"))
    packages = re.findall(r"^(\S+ [\d.]+): part of the text `calibration`$", licences, re.MULTILINE)
    section = re.search(r"- Documentation and code:(.*?)\n\n", readme, re.DOTALL)
    assert section
    named = re.findall(r"([a-z-]+) (\d+\.\d+\.\d+)", re.sub(r"\s+", " ", section[1]))
    assert set(packages) == {" ".join(pair) for pair in named}
    assert licences.count("Copyright") >= len(packages)


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_reads_a_file(tmp_path, suffix):
    path, data = tmp_path / f"own{suffix}", "Größe und Wärme\n".encode()
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    assert load_text(path) == load_text(str(path)) == data.decode()


def test_unknown_name_gets_a_suggestion():
    with pytest.raises(ValueError, match="did you mean wikitext-2-test"):
        load_text("wikitext2-test")
    with pytest.raises(ValueError, match=f"names are {', '.join(NAMES)}"):
        load_text("zzz")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"caf\xe9", "not UTF-8 text"),
        ("a.txt", b" \n", "holds no text"),
        ("a.txt.gz", b"plain", "not a complete gzip file"),
        ("a.txt.gz", gzip.compress(b"some text that was cut" * 50, mtime=0)[:-20], "not a complete gzip file"),
    ],
)
def test_unusable_files(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_text(tmp_path / name)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        load_text(tmp_path / "none.txt")
