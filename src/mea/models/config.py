"""Configuration of the decoder: a Llama-shaped model whose attention is chosen by name."""

from typing import Any

from transformers import PreTrainedConfig

from mea.attention import by_name
from mea.ops.rope import RopeConfig


class MeaConfig(PreTrainedConfig):
    """Shape of a decoder, and the method of its attention.

    Fields that are not listed are those of ``transformers.LlamaConfig``.

    Attributes
    ----------
    attention
        Name of the method: a key of `mea.attention.METHODS`.
    attention_options
        Options of that method's class by name, where they differ from its defaults: ``{"head_norm": "shared_gain"}``.
    head_norm_eps
        Epsilon of every norm inside attention; `rms_norm_eps` is for the norms before attention and feed-forward
        layers.
    rope_parameters
        As in Hugging Face's Llama: ``rope_theta``, ``partial_rotary_factor``, and ``rope_type``: ``"default"``,
        ``"linear"`` or ``"llama3"`` with their parameters, or ``"none"`` for no position embedding.
    sliding_window
        Tokens that a query attends to in every layer, its own included; None for all.
    """

    # The constructor takes fields that it does not declare (Hugging Face wraps it), which a type checker at run time
    # would refuse.
    __no_type_check__ = True

    model_type = "mea"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012, the type Hugging Face declares

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1280
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention: str = "mea"
    attention_options: dict[str, Any] | None = None
    head_norm_eps: float = 1e-5
    attention_bias: bool = False
    sliding_window: int | None = None
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.attention_options = dict(self.attention_options or {})
        self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, **(self.rope_parameters or {})}
        by_name(self.attention)  # a wrong name fails here, with a hint, not at the first layer
        super().__post_init__(**kwargs)

    def rope(self) -> RopeConfig | None:
        """The rotary embedding that `rope_parameters` describes.

        Raises
        ------
        ValueError
            `rope_type` is a kind of scaling that this package does not support.
        """
        parameters = dict(self.rope_parameters or {})
        kind = parameters.get("rope_type", "default")
        if kind == "none":
            return None
        if kind not in ("default", "linear", "llama3"):
            raise ValueError(f"rope_type must be 'default', 'linear', 'llama3' or 'none', not {kind!r}")
        original = parameters.get("original_max_position_embeddings") or self.max_position_embeddings
        return RopeConfig(
            theta=float(parameters.get("rope_theta", 10000.0)),
            scaling=kind,
            fraction=float(parameters.get("partial_rotary_factor", 1.0)),
            factor=float(parameters.get("factor", 1.0)),
            low_freq_factor=float(parameters.get("low_freq_factor", 1.0)),
            high_freq_factor=float(parameters.get("high_freq_factor", 4.0)),
            original_max_position=int(original),
        )
