"""Multi-query associative recall (arXiv 2312.04927): pairs of words, then some first words, each asking for its second.

Nothing but looking up is needed, so that small models trained on little text can be told apart. Meant for short texts.
"""

from random import Random

from mea.evaluate.long_context.prompts import Prompt, Query, Source

QUERIES = 8
WRONG = 7
LONGEST = 1024  # tokens: beyond, words of a single token run out


def recall(source: Source, tokens: int, random: Random) -> Prompt:
    """As many pairs as there is room for; all queries are asked of the same text, and the wrong answers are in it.

    Raises
    ------
    ValueError
        There is no room for the pairs that are asked for.
    """
    words = random.sample(source.words[:2048], min(2048, len(source.words)))
    room = tokens - 3 * max(len(source.answer(word)) for word in words) - 4
    pairs = []
    for pair in zip(words[::2], words[1::2], strict=False):
        room -= source.count(_line(pair))
        if room < 0:
            break
        pairs.append(pair)
    if len(pairs) < QUERIES:
        raise ValueError(f"the task recall does not fit into {tokens:,} tokens: ask for longer texts")
    queries = []
    for key, value in random.sample(pairs, QUERIES):
        wrong = random.sample([other for _, other in pairs if other != value], WRONG)
        queries.append(Query(f"{key}:", (value,), tuple(wrong)))
    return Prompt("".join(map(_line, pairs)), tuple(queries))


def _line(pair: tuple[str, str]) -> str:
    return f"{pair[0]}: {pair[1]}\n"
