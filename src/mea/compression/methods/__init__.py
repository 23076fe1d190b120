"""The factorisation methods by name.

One method is one file; a new one takes its place in `METHODS`. docs/adding_a_method.md shows how.
"""

from mea.compression.methods import joint, post_rope, pre_rope
from mea.compression.methods.base import Method
from mea.compression.methods.baselines import gauge, gqa_mean, gqa_procrustes, gram, svd
from mea.names import did_you_mean

METHODS: dict[str, Method] = {
    method.label: method
    for method in (
        *(post_rope.method(weighting) for weighting in post_rope.WEIGHTINGS),
        pre_rope.METHOD,
        joint.METHOD,
        svd.METHOD,
        gram.METHOD,
        gqa_mean.METHOD,
        gqa_procrustes.METHOD,
        gauge.METHOD,
    )
}
DEFAULT_METHOD = "post_rope"
DEFAULT_WEIGHTING = "mean"
RENAMED = {
    "blended": "post_rope",
    "position": "post_rope with the weighting uniform",
    "attended": "post_rope with the weighting sensitivity",
    "frequency": "post_rope with the weighting frequency",
    "latent": "pre_rope",
}


def find_method(name: str, num_kv_heads: int) -> Method:
    """The method of that name, for a model with so many kv heads.

    A weighting other than the default stands behind a colon: ``"post_rope:uniform"``.

    Raises
    ------
    ValueError
        There is no such method, or it cannot do anything for such a model.
    """
    if name in RENAMED:
        raise ValueError(f"the method {name!r} is now {RENAMED[name]}")
    if name.removesuffix(f":{DEFAULT_WEIGHTING}") not in METHODS:
        raise ValueError(f"the methods are {', '.join(METHODS)}, not {name!r}{did_you_mean(name, METHODS)}")
    method = METHODS[name.removesuffix(f":{DEFAULT_WEIGHTING}")]
    if method.whole_heads and num_kv_heads == 1:
        finer = ", ".join(other.label for other in METHODS.values() if not other.whole_heads)
        raise ValueError(f"{name!r} mixes whole heads and the model has one kv head only; use {finer}")
    return method
