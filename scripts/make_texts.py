"""Make the texts that ship in src/mea/data, from their sources.

    python scripts/make_texts.py --wikitext FOLDER --passages FILE --books FOLDER [--out src/mea/data]

``--wikitext`` holds raw.test.txt.gz and raw.valid.txt.gz, ``--passages`` is a file of Wikipedia passages separated by
blank lines, ``--books`` holds shards of bzip2 text, books separated by ``<|book|>``, and INDEX.jsonl. The technical
text comes from the running interpreter: the shipped file is that of CPython 3.11. The same sources give the same bytes.
src/mea/data/README.md says where the sources come from.
"""

import argparse
import bz2
import gzip
import hashlib
import json
import random
import re
import shutil
from pathlib import Path
from pydoc_data.topics import topics

SEED = 20_241
BOOK_SEPARATOR = "\n\n<|book|>\n\n"
PASSAGE_CHARACTERS = 260_000
BOOKS, EXCERPT_CHARACTERS = 20, 13_000
TECHNICAL_CHARACTERS = 170_000


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


def technical() -> str:
    """Long topics of CPython's documentation; a topic most of whose paragraphs were already taken is left out."""
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
    return "\n\n\n".join(taken) + "\n"


def write(path: Path, text: str) -> None:
    """Compress with no name and no date, so that the bytes depend on the text alone."""
    path.write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    print(f"{path.name}  {len(text.encode('utf-8')):,} bytes of text  sha256 {digest}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--wikitext", "--passages", "--books"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("src/mea/data"))
    args = parser.parse_args()

    for split in ("test", "valid"):
        shutil.copyfile(args.wikitext / f"raw.{split}.txt.gz", args.out / f"wikitext-2-{split}.txt.gz")
    rng = random.Random(SEED)
    documents = passages(args.passages, rng)
    from_books, books = excerpts(args.books, rng)
    documents += from_books
    rng.shuffle(documents)
    write(args.out / "calibration.txt.gz", "\n\n\n".join(documents) + "\n")
    write(args.out / "technical.txt.gz", technical())
    for book in books:
        print(f"- {book['author']}: {book['title']}")


if __name__ == "__main__":
    main()
