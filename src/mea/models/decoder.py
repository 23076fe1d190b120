"""One decoder for the whole attention family: Llama's shape, attention by name, an ordinary Hugging Face model.

Parameter names are Llama's, so that a model without head norm and mixing is a Llama checkpoint as it stands.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from mea.attention import Attention, by_name
from mea.attention.backends import Backend
from mea.attention.mixing import FeatureMixing, FrequencyMixing, HeadMixing, HeadNorm
from mea.models.config import MeaConfig
from mea.ops.rope import Rotary

# Hugging Face's names of attention implementations, and this package's of the same.
IMPLEMENTATIONS: dict[str, Backend] = {"eager": "eager", "sdpa": "sdpa", "flex_attention": "flex"}


def build_attention(config: MeaConfig, layer_index: int) -> Attention:
    """The attention module of one layer.

    Raises
    ------
    ValueError
        If `attention_options` has a name that the method does not know.
    """
    cls = by_name(config.attention)
    backend = IMPLEMENTATIONS[config._attn_implementation or "sdpa"]
    options: dict[str, Any] = {
        "head_dim": config.head_dim,
        "rope": config.rope(),
        "window": config.sliding_window,
        "bias": config.attention_bias,
        "eps": config.head_norm_eps,
        # Talking-heads attention materialises its scores and has a single backend: the class says which.
        "backend": backend if backend in cls.backends else cls.backends[0],
        "layer_index": layer_index,
    }
    try:
        sizes = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads)
        return cls(*sizes, **options, **(config.attention_options or {}))
    except TypeError as error:
        raise ValueError(
            f"attention_options {config.attention_options} do not suit {config.attention!r}: {error}"
        ) from error


class MLP(nn.Module):
    """Llama's gated feed-forward layer (arXiv 2002.05202)."""

    def __init__(self, config: MeaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class MeaDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward layer, each normalised before and added to the stream."""

    def __init__(self, config: MeaConfig, layer_index: int) -> None:
        super().__init__()
        self.self_attn = build_attention(config, layer_index)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | BlockMask | None = None,
        position_embeddings: Rotary | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attn(normed, mask=attention_mask, positions=position_embeddings, cache=past_key_values)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MeaPreTrainedModel(PreTrainedModel):
    """What Hugging Face asks of every model: initialisation, capabilities, choice of backend."""

    config: MeaConfig
    config_class = MeaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MeaDecoderLayer"]  # noqa: RUF012, the type Hugging Face declares
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012, likewise
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False
    # False keeps generic backends of other programs from running the model without its mixing.
    _supports_attention_backend = False
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        reset = getattr(module, "reset_parameters", None)
        if isinstance(module, HeadMixing | FrequencyMixing | FeatureMixing | Attention) and reset:
            loaded = (getattr(p, "_is_hf_initialized", False) for p in module.parameters(recurse=False))
            if not all(loaded):
                reset()
        elif isinstance(module, HeadNorm) and module.weight is not None:
            nn.init.constant_(module.weight, module.init)
        else:
            super()._init_weights(module)

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """Change the backend of every attention layer: ``"eager"``, ``"sdpa"`` or ``"flex_attention"``."""
        name = attn_implementation.get("", "sdpa") if isinstance(attn_implementation, dict) else attn_implementation
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"attn_implementation must be one of {', '.join(IMPLEMENTATIONS)}; got {name!r}")
        for module in self.modules():
            if isinstance(module, Attention):
                if IMPLEMENTATIONS[name] not in module.backends:
                    raise ValueError(f"{type(module).__name__} runs by {', '.join(module.backends)} only, not {name!r}")
                module.backend = IMPLEMENTATIONS[name]
        self.config._attn_implementation = name


class MeaModel(MeaPreTrainedModel):
    """The decoder without its output projection."""

    def __init__(self, config: MeaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(MeaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the last norm; arguments as in Hugging Face's Llama."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        # A plain pass needs no mask beyond the modules' own rule, and a fused kernel is faster without one. Positions
        # that are given may start anew within a row, which is how Hugging Face marks packed documents.
        plain = attention_mask is None and position_ids is None and past_key_values is None
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(x.shape[1], device=x.device) + seen)[None]
        mask = None if plain else self._mask(x, attention_mask, past_key_values, position_ids)
        first = self.layers[0].self_attn
        assert isinstance(first, Attention)
        turn = None if first.rope is None else first.rotary(position_ids, x.dtype)
        states = [x] if output_hidden_states else None
        for layer in self.layers:
            x = layer(x, attention_mask=mask, position_embeddings=turn, past_key_values=past_key_values)
            if states is not None:
                states.append(x)
        x = self.norm(x)
        if states is not None:
            states[-1] = x
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=None if states is None else tuple(states),
        )

    def _mask(
        self, x: Tensor, attention_mask: Tensor | None, cache: Cache | None, positions: Tensor
    ) -> Tensor | BlockMask | None:
        """Hugging Face's mask for this cache and padding, as the attention modules take it: true where one may look."""
        make = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
        # No mask means "the queries are the last of the keys", which a cache of fixed length breaks: its tail is empty.
        grows = not getattr(cache, "is_compileable", False)
        mask = make(self.config, x, attention_mask, cache, position_ids=positions, allow_is_causal_skip=grows)
        if not isinstance(mask, Tensor):
            return mask
        if mask.is_floating_point():
            mask = mask == 0
        # A padded query that sees nothing would be 0/0 in some backends, and NaN in a key spoils everything after it.
        return mask if attention_mask is None else mask | ~mask.any(dim=-1, keepdim=True)


class MeaForCausalLM(MeaPreTrainedModel, GenerationMixin):
    """The decoder with its output projection, for training and generation."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012, likewise

    def __init__(self, config: MeaConfig) -> None:
        super().__init__(config)
        self.model = MeaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits, and the loss if there are `labels`; arguments as in Hugging Face's Llama."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )
        return result if return_dict is not False else result.to_tuple()


def register() -> None:
    """Make ``AutoConfig`` and ``AutoModelForCausalLM`` know the model type ``"mea"``."""
    AutoConfig.register(MeaConfig.model_type, MeaConfig, exist_ok=True)
    AutoModelForCausalLM.register(MeaConfig, MeaForCausalLM, exist_ok=True)
