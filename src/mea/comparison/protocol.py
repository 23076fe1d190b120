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
        Tokens of a window of the texts.
    position_text, positions
        One pass of the last position's length, and the edges of the ranges it is reported by; none without positions.
    prompt, new_tokens
        Prompt that models continue greedily, and the number of tokens; none if the prompt is empty.
    decode_context, decode_steps
        Cached tokens and number of timed decoding steps, in `decode_dtype` (``"fast"``: bfloat16 if this machine has
        fast bfloat16 products, else float32); 0 steps: no timing.
    context
        Tokens of each window that are read before the scored continuation; 0 for no continuations.
    cache_tokens
        Length at which caches are measured, at most the model's limit: exact tokens dominate short caches.
    dtype
        Dtype of scoring and of the measured cache.
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
