"""Make the texts that ship in src/mea/data, from their sources.

    python scripts/make_texts.py --wikitext FOLDER --passages FILE --books FOLDER [--out src/mea/data]

``--wikitext`` holds raw.test.txt.gz and raw.valid.txt.gz, ``--passages`` is a file of Wikipedia passages separated by
blank lines, ``--books`` holds shards of bzip2 text, books separated by ``<|book|>``, and INDEX.jsonl. The technical
texts come from the running interpreter, which must be CPython 3.11.7; documentation and code come from Python packages
as they are installed, in the versions of `PACKAGES`. The same sources give the same bytes. ``--technical SHARE`` makes
a calibration text with another share of documentation and code. src/mea/data/README.md names the sources.
"""

import argparse
import ast
import bz2
import gzip
import hashlib
import json
import random
import re
import shutil
import sys
import sysconfig
from importlib.metadata import distribution, version
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

SEED = 20_241
BOOK_SEPARATOR = "\n\n<|book|>\n\n"
BETWEEN = "\n\n\n"
PASSAGE_CHARACTERS = 260_000
BOOKS, EXCERPT_CHARACTERS = 20, 13_000
TECHNICAL_CHARACTERS, TECHNICAL_VALID_CHARACTERS = 170_000, 60_000
CALIBRATION_CHARACTERS = 540_000
SHARE, CODE_SHARE = 0.2, 0.25  # of documentation and code in the text, and of code in that
PART_CHARACTERS = 4_000  # of a book excerpt in the calibration text: about one window of tokens
# All BSD-3-Clause or MIT; what lies in folders or files named like `COPIES` may be of others, or a test.
PACKAGES = {
    "numpy": "2.4.6",
    "scipy": "1.17.1",
    "networkx": "3.6.1",
    "rich": "15.0.0",
    "typer": "0.29.2",
    "pandas": "3.1.1",
    "sympy": "1.14.0",
    "click": "8.5.1",
    "more-itertools": "11.2.1",
}
COPIES = ("_lib", "_click", "_vendor", "external", "parsing", "test", "clipboard")
RUN = 13

Runs = set[tuple[str, ...]]


def runs(text: str) -> Runs:
    """All runs of `RUN` consecutive words, as tests/test_texts.py counts them."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


def passages(file: Path, rng: random.Random) -> list[str]:
    """Whole passages in random order until there are enough characters."""
    found = gzip.decompress(file.read_bytes()).decode("utf-8").strip().split("\n\n")
    rng.shuffle(found)
    chosen, size = [], 0
    for passage in found:
        if size >= PASSAGE_CHARACTERS:
            break
        chosen.append(passage)
        size += len(passage)
    return chosen


def excerpts(folder: Path, rng: random.Random) -> tuple[list[str], list[dict]]:
    """One excerpt of consecutive paragraphs from the middle of each of several books, no author twice."""
    books = [json.loads(line) for line in (folder / "INDEX.jsonl").read_text(encoding="utf-8").splitlines()]
    place: dict[str, int] = {}
    for book in books:  # the index lists the books of a shard in their order
        book["number"] = place.get(book["shard"], 0)
        place[book["shard"]] = book["number"] + 1
    rng.shuffle(books)
    long_enough = (book for book in books if book["chars"] >= 8 * EXCERPT_CHARACTERS)
    chosen = list({book["author"]: book for book in long_enough}.values())[:BOOKS]
    texts = []
    for book in chosen:
        shard = bz2.decompress((folder / book["shard"]).read_bytes()).decode("utf-8")
        paragraphs = shard.split(BOOK_SEPARATOR)[book["number"]].strip().split("\n\n")
        start = rng.randrange(len(paragraphs) // 4, len(paragraphs) // 2)
        texts.append("")
        for paragraph in paragraphs[start:]:
            if len(texts[-1]) >= EXCERPT_CHARACTERS:
                break
            texts[-1] += ("\n\n" if texts[-1] else "") + paragraph.strip()
    return texts, chosen


def parts(text: str) -> list[str]:
    """A text cut between paragraphs into pieces of `PART_CHARACTERS` or a little more; the last may be shorter."""
    pieces = [""]
    for paragraph in text.split("\n\n"):
        if len(pieces[-1]) >= PART_CHARACTERS:
            pieces.append("")
        pieces[-1] += ("\n\n" if pieces[-1] else "") + paragraph
    return pieces


def technical() -> tuple[str, str]:
    """Long topics of CPython's documentation, and others that share no run of words with them, to choose on.

    A topic most of whose paragraphs were already taken is left out of the first.
    """
    taken: list[str] = []
    seen: set[str] = set()
    for name in sorted(topics, key=lambda topic: (-len(topics[topic]), topic)):
        paragraphs = re.split(r"\n\s*\n", topics[name].strip())
        if len(seen.intersection(paragraphs)) > 0.05 * len(paragraphs) or len(topics[name]) > TECHNICAL_CHARACTERS // 2:
            continue
        if sum(map(len, taken)) >= TECHNICAL_CHARACTERS:
            break
        taken.append(topics[name].strip())
        seen.update(paragraphs)
    tested = BETWEEN.join(taken) + "\n"
    rest = [topics[name].strip() for name in sorted(topics) if len(topics[name]) > 2_000]
    valid = choose(rest, TECHNICAL_VALID_CHARACTERS, random.Random(SEED), runs(tested))
    return tested, BETWEEN.join(valid) + "\n"


def package_pieces(name: str) -> tuple[list[str], list[str]]:
    """Docstrings of a package's public functions and classes, and functions without one as code."""
    spec = find_spec(name.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations or version(name) != PACKAGES[name]:
        raise SystemExit(f"the texts are made from {name} {PACKAGES[name]}: pip install {name}=={PACKAGES[name]}")
    root = Path(spec.submodule_search_locations[0])
    documentation, code = [], []
    for path in sorted(root.rglob("*.py")):
        if any(copy in part for part in path.relative_to(root).parts for copy in COPIES):
            continue
        text = path.read_text(encoding="utf-8")
        if not text.isascii():
            continue
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            found = ast.get_docstring(node)
            source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            if found and 1_200 < len(found) < 6_000:
                documentation.append(f"{node.name}\n\n{found}")
            elif isinstance(node, ast.FunctionDef) and not found and 800 < len(source) < 3_000:
                code.append(source)
    return documentation, code


def choose(found: list[str], characters: float, rng: random.Random, taken: Runs) -> list[str]:
    """Pieces in random order until there are enough characters; none repeats what was taken, to which it is added."""
    rng.shuffle(found)
    chosen: list[str] = []
    for piece in found:
        if sum(map(len, chosen)) >= characters:
            break
        own = runs(piece)
        if own.isdisjoint(taken):
            chosen.append(piece)
            taken |= own
    return chosen


def from_packages(characters: float, tested: Runs) -> tuple[list[str], list[str]]:
    """Documentation and code, the packages alike as far as each has enough."""
    rng, taken = random.Random(SEED + 1), set(tested)
    pools = [package_pieces(name) for name in PACKAGES]
    made: list[list[str]] = []
    for kind, share in enumerate((1 - CODE_SHARE, CODE_SHARE)):
        chosen: list[str] = []
        pools.sort(key=lambda pool: sum(map(len, pool[kind])))  # what one lacks, those after it give
        for done, pool in enumerate(pools):
            missing = characters * share - sum(map(len, chosen))
            chosen += choose(pool[kind], missing / (len(pools) - done), rng, taken)
        rng.shuffle(chosen)
        made.append(chosen)
    return made[0], made[1]


def mix(kinds: list[tuple[float, list[str]]], characters: int) -> str:
    """Documents in turn, so that every stretch of the text holds each kind by its share.

    Next comes a document of the kind that is farthest behind its share.
    """
    rest = [iter(documents) for _, documents in kinds]
    sizes, chosen = [0] * len(kinds), []
    while sum(sizes) < characters:
        behind = [share * sum(sizes) - size for (share, _), size in zip(kinds, sizes, strict=True)]
        kind = behind.index(max(behind))
        chosen.append(next(rest[kind]))
        sizes[kind] += len(chosen[-1])
    print("characters of each kind:", sizes)
    return BETWEEN.join(chosen) + "\n"


def licences() -> str:
    """What the packages' licences ask to go along with their text, and CPython's."""
    text = [(Path(sysconfig.get_path("stdlib")) / "LICENSE.txt").read_text(encoding="utf-8")]
    text[0] = "CPython 3.11.7: texts `technical` and `technical-valid`\n\n" + text[0].strip()
    for name, number in PACKAGES.items():
        files = distribution(name).files or []
        found = min((f for f in files if re.match("LICEN|COPYING", f.name)), key=lambda f: len(f.parts))
        own = re.split(r"\n-{4,}\n", found.locate().read_text(encoding="utf-8"))[0]  # then those of bundled libraries
        text.append(f"{name} {number}: part of the text `calibration`\n\n{own.strip()}")
    return f"\n\n{'=' * 100}\n".join(text) + "\n"


def write(path: Path, text: str) -> None:
    """Compress with no name and no date, so that the bytes depend on the text alone."""
    path.write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    print(f"{path.name}  {len(text):,} characters  sha256 {digest}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--wikitext", "--passages", "--books"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--technical", type=float, default=SHARE, help="share of documentation and code")
    parser.add_argument("--out", type=Path, default=Path("src/mea/data"))
    args = parser.parse_args()
    if sys.version_info[:3] != (3, 11, 7):
        raise SystemExit("the technical texts are those of CPython 3.11.7: run this with it")
    args.out.mkdir(parents=True, exist_ok=True)

    tested: Runs = set()
    for split in ("test", "valid"):
        file = args.wikitext / f"raw.{split}.txt.gz"
        shutil.copyfile(file, args.out / f"wikitext-2-{split}.txt.gz")
        tested |= runs(gzip.decompress(file.read_bytes()).decode("utf-8"))
    for name, text in zip(("technical", "technical-valid"), technical(), strict=True):
        write(args.out / f"{name}.txt.gz", text)
        tested |= runs(text)

    rng = random.Random(SEED)
    from_wikipedia = passages(args.passages, rng)
    from_books, books = excerpts(args.books, rng)
    documents = from_wikipedia + from_books
    rng.shuffle(documents)
    write(args.out / "encyclopaedic.txt.gz", BETWEEN.join(documents) + "\n")

    documentation, code = from_packages(args.technical * CALIBRATION_CHARACTERS, tested)
    cut = [part for excerpt in from_books for part in parts(excerpt)]
    rng.shuffle(cut)
    prose, share = (1 - args.technical) / 2, args.technical
    kinds = [(prose, from_wikipedia), (prose, cut)]
    kinds += [(share * (1 - CODE_SHARE), documentation), (share * CODE_SHARE, code)]
    write(args.out / "calibration.txt.gz", mix(kinds, CALIBRATION_CHARACTERS))
    (args.out / "LICENSES.txt").write_text(licences(), encoding="utf-8")
    for book in books:
        print(f"- {book['author']}: {book['title']}")


if __name__ == "__main__":
    main()
