"""The shipped texts are what their README says, apart from each other, and a user's file gives a clear error."""

import copy
import gzip
import hashlib
import json
import re
from functools import cache
from importlib.resources import files

import pytest
import torch

from mea.names import TEXTS
from mea.text import STRETCH, encode_source, encode_text, load_text, repeat_spans

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
    actual = {f"{name}.txt.gz": hashlib.sha256((DATA / f"{name}.txt.gz").read_bytes()).hexdigest() for name in TEXTS}
    assert stated == actual
    for name in TEXTS:
        assert f"| `{name}` | {len(load_text(name)):,} |" in readme


def test_wikitext_is_the_well_known_file():
    digest = hashlib.sha256(load_text("wikitext-2-test").encode()).hexdigest()
    assert digest == "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"


@pytest.mark.parametrize("text", ["calibration", "encyclopaedic", "technical-valid"])
def test_nothing_tested_on_was_calibrated_or_chosen_on(text):
    """What is calibrated on is apart from every other text; technical-valid, to choose on, from what is tested on."""
    own = runs_of(text)
    assert len(own) > 5_000
    for name in set(TEXTS) - {"calibration", "encyclopaedic", text}:
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
    with pytest.raises(ValueError, match="did you mean 'wikitext-2-test'"):
        load_text("wikitext2-test")
    with pytest.raises(ValueError, match=f"texts are {', '.join(TEXTS)}"):
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


@pytest.mark.parametrize("length", [8, 64, STRETCH, 2 * STRETCH, 2 * STRETCH + 5])
def test_stretches_end_with_a_copy_of_their_own_tokens(length):
    rows = torch.arange(40 * length).view(40, length)  # no token twice: what occurs twice has been copied
    made = repeat_spans(rows, 0.5)
    changed = (made != rows).any(1)
    assert changed.sum() == 20
    for before, after in zip(rows[changed], made[changed], strict=True):
        for own, stretch in zip(before.split(STRETCH), after.split(STRETCH), strict=True):
            copied = int((own != stretch).sum())
            if len(own) < 8:
                assert not copied
                continue
            assert max(1, len(own) // 16) <= copied <= 7 * len(own) // 16
            assert torch.equal(stretch[:-copied], own[:-copied])
            source = int(stretch[-copied]) - int(own[0])
            assert 1 <= source <= len(own) - 2 * copied, "the copy is of what stands before it, not of the first token"
            assert torch.equal(stretch[-copied:], own[source : source + copied])


def test_rereading_leaves_what_it_is_given_and_repeats_itself():
    rows = torch.arange(640).view(10, 64)
    assert torch.equal(repeat_spans(rows, 0.0), rows)
    assert torch.equal(repeat_spans(rows, 1.0, seed=3), repeat_spans(rows, 1.0, seed=3))
    assert not torch.equal(repeat_spans(rows, 1.0, seed=3), repeat_spans(rows, 1.0, seed=4))
    assert torch.equal(rows, torch.arange(640).view(10, 64))


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
CHATS = [[("user", "What is a cache?"), ("assistant", "A store.")], [("user", "Thanks")]]


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def test_conversations_pass_through_the_chat_template(tokenizer, tmp_path):
    tokenizer = with_template(tokenizer, TEMPLATE)
    path = tmp_path / "chats.jsonl.gz"
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in chat]}) for chat in CHATS]
    path.write_bytes(gzip.compress("\n\n".join(lines).encode()))
    rendered = "".join(f"<{role}>{content}\n" for chat in CHATS for role, content in chat)
    assert torch.equal(encode_source(tokenizer, path), encode_text(tokenizer, rendered))
    assert torch.equal(encode_source(tokenizer, path, 5), encode_text(tokenizer, rendered, 5))


@pytest.mark.parametrize(
    "line", ['{"text": "a"}', '{"messages": []}', '{"messages": [{"role": "user"}]}', '["a"]', "a", "[" * 100_000, "7"]
)
def test_a_line_that_is_no_conversation_is_named(tokenizer, tmp_path, line):
    tokenizer = with_template(tokenizer, TEMPLATE)
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}\n' + line)
    with pytest.raises(ValueError, match="line 2 must be"):
        encode_source(tokenizer, path)


@pytest.mark.parametrize(("template", "message"), [(None, "no chat template"), ("{{ 1 / 0 }}", "template fails")])
def test_a_template_that_is_missing_or_fails_is_named(tokenizer, tmp_path, template, message):
    tokenizer = with_template(tokenizer, template)
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}')
    with pytest.raises(ValueError, match=message):
        encode_source(tokenizer, path)
