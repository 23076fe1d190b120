"""The factorisation methods by name.

A method is one file with a tuple ``METHODS`` and one line in `mea.names.METHODS`; docs/adding_a_method.md shows how.
"""

from importlib import import_module

from mea import names
from mea.compression.methods.base import DEFAULT_WEIGHTING, Method
from mea.names import CODED_METHODS, DEFAULT_METHOD, did_you_mean, listed

__all__ = ["DEFAULT_METHOD", "METHODS", "RENAMED", "Method", "find_method"]

METHODS: dict[str, Method] = {
    method.label: method
    for file in dict.fromkeys(names.METHODS.values())
    for method in import_module(f"{__name__}.{file}").METHODS
}
RENAMED = {
    "blended": "post_rope",
    "position": "post_rope:uniform",
    "attended": "post_rope:sensitivity",
    "frequency": "post_rope:frequency",
    "latent": "pre_rope",
}


def find_method(name: str, num_kv_heads: int) -> Method:
    """The method of that name, for a model with this number of kv heads.

    A weighting other than the default follows a colon: ``"post_rope:uniform"``.

    Raises
    ------
    ValueError
        There is no such method, or it needs more than one kv head.
    """
    if name in RENAMED:
        raise ValueError(f"the method {name!r} is now {RENAMED[name]}")
    if name.removesuffix(f":{DEFAULT_WEIGHTING}") not in METHODS:
        raise ValueError(f"the methods are {', '.join(METHODS)}, not {name!r}{did_you_mean(name, METHODS)}")
    method = METHODS[name.removesuffix(f":{DEFAULT_WEIGHTING}")]
    if method.whole_heads and num_kv_heads == 1:
        raise ValueError(
            f"{name!r} mixes whole heads, and the model has only one kv head: give {listed(CODED_METHODS)}"
        )
    return method
