"""Common words: which occur most often in a long list, after RULER's common-word extraction (arXiv 2404.06654)."""

from random import Random

from mea.evaluate.long_context.prompts import Prompt, Query, Source

COMMON, WRONG = 4, 12  # words that are common, and rare ones that are offered as answers
OFTEN, RARELY = 15, 3  # times


def common_words(source: Source, tokens: int, random: Random) -> Prompt:
    """Common words `OFTEN` times and rare ones `RARELY`, shuffled: a longer text has more rare ones.

    Where the text is too short for that many, common words take half of it.

    Raises
    ------
    ValueError
        There is no room for a list in which anything is common.
    """
    words = random.sample(source.words[:4000], min(4000, len(source.words)))
    common, rare = words[:COMMON], words[COMMON:]
    query = Query("\n\nThe most common words in the list: the word", tuple(common), tuple(rare[:WRONG]))
    room = tokens - source.reserve([query])
    high, low = room, 0  # words of the list: found by halving, as the words' tokens differ
    text = ""
    while high - low > 1:
        middle = (high + low) // 2
        tried = _list(middle, common, rare, random)
        if tried and source.count(tried) > room:
            high = middle
        else:
            low, text = middle, tried or text
    if not text:
        raise ValueError(f"the task common-words does not fit into {tokens:,} tokens: ask for longer texts")
    return Prompt(text, (query,))


def _list(size: int, common: list[str], rare: list[str], random: Random) -> str:
    """A list of about `size` words; empty if that is too few."""
    often = min(OFTEN, size // (2 * COMMON))
    kinds = (size - often * COMMON) // RARELY
    if often <= RARELY or kinds < WRONG:
        return ""
    times = RARELY * -(-kinds // len(rare))
    listed = common * max(often, 5 * times if times > RARELY else 0) + rare[:kinds] * times
    random.shuffle(listed)
    return "Words: " + ", ".join(listed) + "."
