"""Needles in a haystack: one fact at a given depth of a text, or eight facts of one form of which each is asked for.

The tasks of RULER (arXiv 2404.06654) called single and multi-key retrieval, with a word to find instead of a number:
most words are a single token, so that all answers can be compared after one reading.
"""

from random import Random

from mea.evaluate.long_context.prompts import Prompt, Query, Source, hide

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
KEYS = 8
WRONG = 7
PLACES = (
    "harbour", "library", "station", "garden", "museum", "theatre", "castle", "market", "school", "hospital", "bakery",
    "lighthouse", "chapel", "tower", "prison", "factory", "palace", "stable", "cellar", "workshop", "mill", "bridge",
)  # fmt: skip
FACT = "The password of the {place} is {word}."
ASK = "\n\nAs the text says, the password of the {place} is"


def needle(source: Source, tokens: int, random: Random, depth: float) -> Prompt:
    """One fact; the wrong answers are words like the right one that the fact does not name."""
    place, (right, *wrong) = random.choice(PLACES), random.sample(source.words[:1000], 1 + WRONG)
    query = Query(ASK.format(place=place), (right,), tuple(wrong), depth)
    fact = FACT.format(place=place, word=right)
    return Prompt(hide(source, [(depth, fact)], tokens - source.reserve([query]), random, "needle"), (query,))


def many_needles(source: Source, tokens: int, random: Random) -> Prompt:
    """Facts evenly over the text; the wrong answers to each question are what the other facts say."""
    places, words = random.sample(PLACES, KEYS), random.sample(source.words[:1000], KEYS)
    depths = [(2 * i + 1) / (2 * KEYS) for i in range(KEYS)]
    queries = tuple(
        Query(ASK.format(place=place), (word,), tuple(x for x in words if x != word), depth)
        for depth, place, word in zip(depths, places, words, strict=True)
    )
    facts = [
        (depth, FACT.format(place=place, word=word)) for depth, place, word in zip(depths, places, words, strict=True)
    ]
    return Prompt(hide(source, facts, tokens - source.reserve(queries), random, "multi-key"), queries)
