"""Variable tracking: which word a variable stands for that was assigned through others.

After RULER (arXiv 2404.06654), which asks for all variables of a value; here a value is asked for, given the last
variable of its chain, so that the values of the other chains are the wrong answers.
"""

from random import Random
from string import ascii_uppercase

from mea.evaluate.long_context.prompts import Prompt, Query, Source, hide

CHAINS = 4
HOPS = 1


def tracking(source: Source, tokens: int, random: Random) -> Prompt:
    """Chains of assignments, each in order, scattered over the text among each other."""
    words = random.sample(source.words[:1000], CHAINS)
    names = random.sample(ascii_uppercase, CHAINS * (HOPS + 1))
    chains = [names[i::CHAINS] for i in range(CHAINS)]
    order = [chain for chain in range(CHAINS) for _ in range(HOPS + 1)]
    random.shuffle(order)
    facts, done = [], [0] * CHAINS
    for number, chain in enumerate(order):
        step = done[chain]
        value = words[chain] if step == 0 else f"variable {chains[chain][step - 1]}"
        facts.append((number / (len(order) - 1), f"Variable {chains[chain][step]} is set to {value}."))
        done[chain] += 1
    queries = tuple(
        Query(
            f"\n\nFollowing these assignments, variable {chain[-1]} stands for the word",
            (word,),
            tuple(x for x in words if x != word),
        )
        for chain, word in zip(chains, words, strict=True)
    )
    return Prompt(hide(source, facts, tokens - source.reserve(queries), random, "tracking"), queries)
