"""Arithmetic word problems with worked solutions, from a seed: text of a domain that needs calculating."""

from random import Random

NAMES = ("Ada", "Bruno", "Clara", "Daniel", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Karim", "Lena")
THINGS = ("apples", "books", "stamps", "marbles", "pencils", "tickets", "shells", "coins", "cards", "candles")


def problems(count: int, seed: int = 0) -> str:
    """Some problems, a paragraph each."""
    random = Random(f"problems {seed}")
    return "\n\n".join(random.choice((_sharing, _buying, _travelling, _growing))(random) for _ in range(count)) + "\n"


def _sharing(random: Random) -> str:
    name, other, third = random.sample(NAMES, 3)
    things, each, friends, rest = (
        random.choice(THINGS),
        random.randint(3, 25),
        random.randint(2, 9),
        random.randint(1, 8),
    )
    total = each * friends + rest
    return (
        f"{name} has {total} {things} and gives {each} of them to each of {friends} friends, among them {other} and "
        f"{third}. How many {things} are left? The friends get {friends} * {each} = {each * friends} {things}. "
        f"{total} - {each * friends} = {rest}, so {rest} {things} are left."
    )


def _buying(random: Random) -> str:
    name, (first, second) = random.choice(NAMES), random.sample(THINGS, 2)
    a, b, p, q = (random.randint(2, 12) for _ in range(4))
    total = a * p + b * q
    paid = -(-total // 10) * 10 + 10 * random.randint(0, 2)
    return (
        f"{name} buys {a} {first} for {p} euros each and {b} {second} for {q} euros each, and pays with {paid} euros. "
        f"How much change is there? The {first} cost {a} * {p} = {a * p} euros and the {second} {b} * {q} = {b * q} "
        f"euros, together {a * p} + {b * q} = {total} euros. The change is {paid} - {total} = {paid - total} euros."
    )


def _travelling(random: Random) -> str:
    name, speed, hours, extra = (
        random.choice(NAMES),
        5 * random.randint(3, 24),
        random.randint(2, 7),
        random.randint(5, 60),
    )
    driven = hours * speed
    return (
        f"{name} drives {hours} hours at {speed} kilometres an hour and then walks {extra} kilometres more. How long "
        f"is the way? {hours} * {speed} = {driven}, and {driven} + {extra} = {driven + extra}: the way is "
        f"{driven + extra} kilometres long."
    )


def _growing(random: Random) -> str:
    name, things, start, factor = (
        random.choice(NAMES),
        random.choice(THINGS),
        random.randint(2, 15),
        random.randint(2, 4),
    )
    first, second = start * factor, start * factor * factor
    return (
        f"{name} begins a collection with {start} {things}. Every year it becomes {factor} times as large. How many "
        f"{things} are there after two years? After one year there are {start} * {factor} = {first}, after two years "
        f"{first} * {factor} = {second} {things}."
    )
