"""Lists of the names that users can give, and spelling suggestions for unknown names.

The command line shows these lists without importing torch or transformers, which would take seconds. Methods of
compression are registered here; tests hold the other lists against their registries.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches

TEXTS = ("wikitext-2-test", "wikitext-2-valid", "technical", "technical-valid", "calibration", "encyclopaedic")
DTYPES = ("auto", "fast", "float32", "bfloat16", "float16")
METHODS = {  # name -> its file in mea.compression.methods
    "predictive": "coded",
    "joint": "coded",
    "svd": "whole_heads.svd",
    "gauge": "whole_heads.gauge",
    "gqa-mean": "whole_heads.gqa_mean",
    "gqa-procrustes": "whole_heads.gqa_procrustes",
    "post_rope": "baselines.post_rope",
    "pre_rope": "baselines.pre_rope",
    "shared": "baselines.shared",
    "gram": "baselines.gram",
}
DEFAULT_METHOD = "predictive"
CODED_METHODS = ("predictive", "joint")  # give bits to components; the others lower ranks
WHOLE_HEAD_METHODS = ("svd", "gauge", "gqa-mean", "gqa-procrustes")
BASELINES = ("post_rope", "pre_rope", "shared", "gram")  # only to compare with: mea compress does not offer them
DEFAULT_KEEP, DEFAULT_CODED_KEEP = 0.5, 0.2  # of methods that lower ranks, and of the others
CODED_KEEPS, RANKED_KEEPS = (0.08, 0.1, 0.14, 0.2, 0.28), (0.5,)  # sizes of a comparison that names none
LAYOUTS = ("full", "half", "deep")
CACHE_BITS = (2, 3, 4, 8)
SUITES = ("zero-shot", "knowledge", "science", "math", "long-context")
STAGES = ("distill", "cpt")
DEFAULT_STAGE = "distill"
TRAINED = ("factors", "attention", "all", "lora")


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all control characters but tab and line feed
SPECIAL = re.compile(r"[\\`*]|(?<!\w)_|_(?!\w)|(?<=\])(?=[(\[:])")  # what Markdown would read as marks


def printable(text: str) -> str:
    """Text without control characters: records may come from anywhere, and a terminal obeys escape sequences.

    Half of a surrogate pair, which cannot be encoded, becomes a question mark.
    """
    return CONTROL.sub("", text).encode("utf-8", "replace").decode()


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return SPECIAL.sub(r"\\\g<0>", printable(text)).replace("&", "&amp;").replace("<", "&lt;")


def did_you_mean(name: object, choices: Iterable[str]) -> str:
    """The end of an error message: ``"; did you mean 'svd'?"``, or nothing where no choice is near.

    Case does not count.
    """
    folded = {choice.lower(): choice for choice in reversed(list(choices))}
    near = get_close_matches(str(name).lower(), folded, n=1)
    return f"; did you mean {folded[near[0]]!r}?" if near else ""


def listed(names: Iterable[object]) -> str:
    """``a, b or c``."""
    *most, last = map(str, names)
    return f"{', '.join(most)} or {last}" if most else last


def size(count: float | int) -> str:
    """A number of bytes: ``5.6 MiB``."""
    power = 0
    while count >= 1024 and power < 4:
        count, power = count / 1024, power + 1
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{count:.1f} {unit}" if power else f"{count:.0f} B"
