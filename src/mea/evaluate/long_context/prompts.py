"""Parts of all tasks: a context, questions about it, and running text of a given number of tokens."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

from mea.text import load_text, start_token

HEAD = 200  # the most frequent words of a text are not used: most of them are grammar
LETTERS = "4,8"  # of words, from and to
SENTENCE = (20, 400)  # characters


@dataclass(frozen=True)
class Query:
    """A question after a context.

    Attributes
    ----------
    ask
        Text that follows the context and that the answer continues.
    right, wrong
        Answers: words, each preceded by a space in the text. Any of `right` is right.
    depth
        Where in the context the answer is: 0 at its beginning, 1 at its end, None if at several.
    """

    ask: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    depth: float | None = None

    @property
    def candidates(self) -> tuple[str, ...]:
        return self.right + self.wrong


@dataclass(frozen=True)
class Prompt:
    """A context that is read once, and the questions about it."""

    context: str
    queries: tuple[Query, ...]


class Source:
    """A tokenizer and a text from which prompts are made.

    Parameters
    ----------
    tokenizer
        The model's tokenizer.
    text
        Name of a packaged text, or a file.

    Raises
    ------
    ValueError, OSError
        As `mea.text.load_text`; or the text has too few sentences or words.
    """

    def __init__(self, tokenizer: Any, text: str = "wikitext-2-valid"):
        self.tokenizer, self.name = tokenizer, text
        self.start = start_token(tokenizer)
        content = load_text(text)
        self.sentences = sentences(content)
        if len(self.sentences) < 8:
            raise ValueError(
                f"{text} has {len(self.sentences)} sentences: too few to hide facts between; give a longer text"
            )
        words = Counter(re.findall(rf"\b[a-z]{{{LETTERS}}}\b", content))
        self._words = [word for word, _ in words.most_common()]
        if len(self._words) < HEAD + 100:
            raise ValueError(
                f"{text} has {len(self._words)} words of the right length: too few for questions; give a longer text"
            )

    def ids(self, text: str) -> list[int]:
        """Tokens of a text without special ones."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def count(self, text: str) -> int:
        """Number of tokens."""
        return len(self.ids(text))

    def answer(self, word: str) -> list[int]:
        """Tokens of an answer."""
        return self.ids(f" {word}")

    @cached_property
    def words(self) -> list[str]:
        """Words to choose from, those of the fewest tokens first, the commoner before the rarer."""
        chosen = self._words[HEAD:]
        lengths = self._lengths([f" {word}" for word in chosen])
        order = sorted(range(len(chosen)), key=lambda i: lengths[i])  # stable
        return [chosen[i] for i in order]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sentence."""
        return self._lengths([f" {sentence}" for sentence in self.sentences])

    def reserve(self, queries: Sequence[Query]) -> int:
        """Tokens to keep free for the longest question with its answer, and for a token that opens the text."""
        longest = max(self.count(query.ask) + self.new_tokens(query) for query in queries)
        return longest + (self.start is not None)

    def new_tokens(self, query: Query) -> int:
        """Tokens that an answer may have: those of the longest right one, and two."""
        return max(len(self.answer(word)) for word in query.right) + 2

    def _lengths(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def sentences(text: str) -> list[str]:
    """Sentences of running text without headings, with ordinary spaces around WikiText's punctuation."""
    parts = []
    for line in text.splitlines():
        if line.lstrip().startswith("="):
            continue
        line = re.sub(r" @([-,.])@ ", r"\1", line.strip())
        line = re.sub(r" ([.,;:!?)]|'s\b)", r"\1", line).replace("( ", "(")
        parts += re.split(r"(?<=[.!?]) (?=[A-Z])", line)
    return [part for part in parts if SENTENCE[0] <= len(part) <= SENTENCE[1]]


def hide(source: Source, facts: Sequence[tuple[float, str]], room: int, random: Random, what: str) -> str:
    """Running text of at most `room` tokens with facts between its sentences.

    Parameters
    ----------
    facts
        ``(depth, sentence)`` in ascending order of depth.
    what
        Name of the task, for the error.

    Raises
    ------
    ValueError
        There is no room for the facts.
    """
    taken = sum(source.count(f" {fact}") for _, fact in facts)
    first, chosen = random.randrange(len(source.sentences)), []
    while True:
        index = (first + len(chosen)) % len(source.sentences)
        taken += source.lengths[index]
        if taken > room:
            break
        chosen.append(index)
    while True:
        text = _between(source, facts, chosen)
        if source.count(text) <= room:
            return text
        if not chosen:
            raise ValueError(f"the task {what} does not fit into {room:,} tokens: ask for longer texts")
        chosen.pop()


def _between(source: Source, facts: Sequence[tuple[float, str]], chosen: Sequence[int]) -> str:
    total = sum(source.lengths[index] for index in chosen)
    pieces, passed, left = [], 0, list(facts)
    for index in chosen:
        while left and left[0][0] * total < passed + source.lengths[index] / 2:
            pieces.append(left.pop(0)[1])
        pieces.append(source.sentences[index])
        passed += source.lengths[index]
    return " ".join([*pieces, *(fact for _, fact in left)])
