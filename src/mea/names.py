"""Names that users give: what to say about one that does not exist."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: object, choices: Iterable[str]) -> str:
    """The end of an error message: ``"; did you mean 'svd'?"``, or nothing where no choice is near.

    Case does not count.
    """
    folded = {choice.lower(): choice for choice in reversed(list(choices))}
    near = get_close_matches(str(name).lower(), folded, n=1)
    return f"; did you mean {folded[near[0]]!r}?" if near else ""
