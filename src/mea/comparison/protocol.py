"""What is measured of every model of a comparison."""

from dataclasses import dataclass

from mea.ops.precision import named_dtype

ORIGINAL = "uncompressed"


@dataclass(frozen=True)
class Protocol:
    """What is measured of every model of a comparison.

    Attributes
    ----------
    texts
        ``(name, tokens)``; the first is the main one.
    window
        For the texts.
    position_text, positions
        One pass of the last position's length, and the edges of the ranges it is reported by; none without positions.
    prompt, new_tokens
        Continued greedily; not without a prompt.
    decode_context, decode_steps
        For the time of a decoding step, in `decode_dtype` (``"fast"``: bfloat16 where this machine multiplies it, else
        float32); not without steps.
    context
        Of each window, what is read before the continuation that is scored; no continuations if 0.
    cache_tokens
        At which caches are measured, at most the model's limit. Tokens that a cache keeps exactly dominate short ones.
    dtype
        To score in, and of the cache that is measured.
    """

    texts: tuple[tuple[str, int], ...] = (("wikitext-2-test", 20480), ("technical", 4096))
    window: int = 1024
    position_text: str = "wikitext-2-test"
    positions: tuple[int, ...] = (0, 1024, 2048, 4096, 8192)
    prompt: str = "The lighthouse keeper had not spoken to anyone for a month when"
    new_tokens: int = 48
    decode_context: int = 8000
    decode_steps: int = 24
    decode_dtype: str = "fast"
    context: int = 0
    cache_tokens: int = 8192
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("decode_dtype", "dtype"):
            object.__setattr__(self, name, named_dtype(getattr(self, name)))


# Minutes on two cores, in the dtype that the machine multiplies fastest.
DEMO_PROTOCOL = Protocol((("wikitext-2-test", 8192), ("technical", 4096)), decode_steps=16, dtype="fast")
