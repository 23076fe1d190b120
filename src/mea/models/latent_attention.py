"""Language models with a compressed KV cache, as ordinary Hugging Face models.

One attention forward serves every supported architecture: `LatentAttention` is mixed into the architecture's own
attention class and caches latents (`ops/latent.py`) where the original caches keys and values. Keys are encoded *after*
their norm, so that reading need not undo it; ``v_proj`` itself encodes values. The cache form (`ops/cache_forms.py`)
defines what is cached and how it is read.

This file and the modules that `modelling_source` lists together are also the self-contained modelling file that
`save_pretrained` writes beside the weights, for ``from_pretrained(..., trust_remote_code=True)`` where this package is
not installed.

Dimensions: ``b`` batch, ``h`` query heads, ``g`` kv heads, ``q`` query tokens, ``t`` cached tokens, ``d`` head
dimension, ``r`` latent rank.
"""

import ast
import copy
import functools
import sys
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mea.models import coded_attention, layer_code, packed_cache
from mea.models.coded_attention import NO_PAGES, CodedAttention
from mea.models.layer_code import CODES
from mea.models.packed_cache import all_dynamic
from mea.ops import cache_forms, codes, latent
from mea.ops.cache_forms import FORMS
from mea.ops.latent import absorbed_is_cheaper, key_positions, read

# Model type -> (configuration class, prefix of the model's class names). Architectures are listed one by one because
# similar attention classes can differ: layers without RoPE (SmolLM3) or one norm over all heads (OLMo2) would convert
# without an error and compute wrong results.
SUPPORTED = {
    "llama": ("LlamaConfig", "Llama"),
    "mistral": ("MistralConfig", "Mistral"),
    "qwen2": ("Qwen2Config", "Qwen2"),
    "qwen3": ("Qwen3Config", "Qwen3"),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3Moe"),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3"),
    "granite": ("GraniteConfig", "Granite"),
}
MODEL_TYPE_PREFIX = "mea_"
MODELLING_FILE = "modeling_mea.py"


class HeadMixing(nn.Module):
    """The head-level linear combinations of one layer, generalised from scalars per head pair to matrices.

    Parameters
    ----------
    num_kv_heads, head_dim
        ``g`` and ``d`` of the original attention.
    key_rank, value_rank
        Latent ranks ``r_k`` and ``r_v``: numbers cached per token. The tensors below have the ranks given by
        `mea.ops.cache_forms.PostRope.decoder_ranks`.
    form
        A name in `mea.ops.cache_forms.FORMS`.
    groups
        ``c``: number of groups of neighbouring heads with separate latents, each with an equal share of the ranks.

    Attributes
    ----------
    key_encoder : [r_k, g * d / c]
        From the keys of a group's heads to its part of the key latent; the rows of the groups are stacked.
    key_decoder : [g, d, r_k / c]
        From its group's part of the key latent to each head's keys.
    value_decoder : [g, d, r_v / c]
        From its group's part of the value latent to each head's values. Its encoder is the layer's ``v_proj``.
    """

    def __init__(self, num_kv_heads: int, head_dim: int, key_rank: int, value_rank: int, form: str, groups: int = 1):
        super().__init__()
        self.form, self.groups = FORMS[form], groups
        key_rank, value_rank = self.form.decoder_ranks(key_rank, value_rank)
        self.key_encoder = nn.Parameter(torch.empty(key_rank, num_kv_heads * head_dim // groups))
        self.key_decoder = nn.Parameter(torch.empty(num_kv_heads, head_dim, key_rank // groups))
        self.value_decoder = nn.Parameter(torch.empty(num_kv_heads, head_dim, value_rank // groups))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as a truncation: a group's first channels are cached, the others are rebuilt as zero."""
        rows, width = self.key_encoder.shape
        for decoder in (self.key_decoder, self.value_decoder):
            decoder.copy_(torch.eye(width, decoder.shape[-1]).repeat(self.groups, 1).view_as(decoder))
        self.key_encoder.copy_(torch.eye(rows // self.groups, width).repeat(self.groups, 1))


class NormedProjection(nn.Module):
    """An RMSNorm of each head, then ``W_O`` (MEA's head norm, arXiv 2601.19611); the norm's gain is in the weight.

    It replaces ``o_proj``, so that no attention class needs its own forward. It is no subclass of `nn.Linear`, because
    code that replaces linear layers (quantisation, LoRA) would silently drop the norm.
    """

    def __init__(self, linear: nn.Linear, head_dim: int, eps: float):
        super().__init__()
        self.linear, self.head_dim, self.eps = linear, head_dim, eps

    @property
    def weight(self) -> Tensor:
        """``W_O``."""
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (-1, self.head_dim))
        return self.linear(nn.functional.rms_norm(heads, (self.head_dim,), None, self.eps).flatten(-2))


def add_head_norm(model: Any, eps: float) -> None:
    """Put a norm of each head before every layer's output projection, in place."""
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.o_proj = NormedProjection(attention.o_proj, attention.head_dim, eps)


# Base of mixins that use the attributes and methods of the stock class after them.
_Mixin: Any = object


class _HeadForHead:
    """A module as the stock eager attention needs it, with one query head per cached head."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.num_key_value_groups = 1
        self.is_causal = False

    def __getattr__(self, name: str) -> Any:
        if name == "module":  # not set yet while an instance is being copied
            raise AttributeError(name)
        return getattr(self.module, name)


class LatentAttention(_Mixin):
    """Forward pass over latents; comes before an architecture's attention class in the bases of a combined class."""

    reading: Literal["auto", "absorbed", "materialised"] = "auto"

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and result as in the stock modules."""
        if kwargs.get("cache") is not None:
            raise NotImplementedError(NO_PAGES)
        keys, values, queries = self._project(hidden_states, position_embeddings)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        name = self.config._attn_implementation
        if name == "sdpa" and attention_mask is None and queries.shape[2] > 1:
            # Causal from an empty cache; a static cache also returns its empty slots.
            keys, values = keys[:, :, : queries.shape[2]], values[:, :, : queries.shape[2]]
        modelling = sys.modules[type(self).__mro__[2].__module__]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, modelling.eager_attention_forward)
        window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
        options = {
            "dropout": self.attention_dropout if self.training else 0.0,
            "scaling": self.scaling,
            "sliding_window": window,
            **kwargs,
        }
        mixing, (_, h, q, _) = self.head_mixing, queries.shape
        is_dense = name in ("eager", "sdpa")
        absorbed = self.reading == "absorbed" or (
            self.reading == "auto" and absorbed_is_cheaper(q, keys.shape[2], h, mixing.key_decoder.shape)
        )
        absorbed = absorbed and is_dense and (q == 1 or attention_mask is not None)
        form, decoders = mixing.form, (mixing.key_decoder, mixing.value_decoder)
        turn = None
        if form.pre_rope:
            turn = self._key_turns(keys, attention_mask, past_key_values, kwargs.get("position_ids"))
        if absorbed:
            output, weights = form.read(
                queries, keys, values, decoders, attention_mask, turn,
                attend=functools.partial(self._attend_latents, options=options),
                scale=self.scaling, dropout=options["dropout"],
            )  # fmt: skip
            output = output.transpose(1, 2)
        else:
            keys, values = form.rebuild(keys, values, decoders, turn)
            output, weights = attend(self, queries, keys, values, attention_mask, **options)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights

    def _attend_latents(
        self, packed: Tensor, keys: Tensor, values: Tensor, attention_mask: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with the queries of a group as rows ``[b, c, h / c * q, r_k / c]``; the output has the same rows."""
        if self.config._attn_implementation == "eager":
            modelling = sys.modules[type(self).__mro__[2].__module__]
            attend = modelling.eager_attention_forward
            output, weights = attend(_HeadForHead(self), packed, keys, values, attention_mask, **options)
            return output.transpose(1, 2), weights
        if attention_mask is None and not options["dropout"]:
            return read(packed, keys, values, self.scaling), None
        output = nn.functional.scaled_dot_product_attention(
            packed, keys, values, attention_mask, dropout_p=options["dropout"], scale=self.scaling
        )
        return output, None

    def _project(self, x: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Latents of the new tokens, ``[b, c, q, r_k / c]`` and the same of values, and queries ``[b, h, q, d]``."""
        modelling = sys.modules[type(self).__mro__[2].__module__]
        shape = (*x.shape[:-1], -1, self.head_dim)
        queries, keys = self.q_proj(x).view(shape), self.k_proj(x).view(shape)
        if hasattr(self, "q_norm"):
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        keys = keys.transpose(1, 2)
        queries, rotated = modelling.apply_rotary_pos_emb(queries.transpose(1, 2), keys, *position_embeddings)
        mixing = self.head_mixing
        values = self.v_proj(x).unflatten(-1, (mixing.groups, -1)).transpose(1, 2)
        return *mixing.form.encode(keys, rotated, values, mixing.key_encoder), queries

    def _key_turns(
        self, latents: Tensor, mask: Any, past_key_values: Any, position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[_, t, d]`` of the angles of all keys in the cache."""
        if position_ids is None:
            raise ValueError("a cache of pre-RoPE keys needs the new tokens' position_ids")
        hidden, past = None, 0
        if past_key_values is not None:
            past = past_key_values.get_seq_length(self.layer_idx) - position_ids.shape[1]
            if isinstance(mask, Tensor):  # [b, 1, q, t], boolean or added to scores; with flash attention [b, t]
                first = mask if mask.dim() == 2 else mask[:, 0, 0]
                hidden = first < 0 if first.is_floating_point() else first == 0
        positions = key_positions(position_ids, hidden, past, latents.shape[2])
        kind = [self.layer_type] if isinstance(self.rotary.rope_type, dict) else []
        if past_key_values is None or latents.device.type != "cpu" or torch.compiler.is_compiling():
            return self.rotary(latents, positions, *kind)
        # All layers share the angles: on a CPU, computing them takes a third of the time of the attention.
        known = vars(past_key_values).setdefault("key_turns", {})
        key = (*kind, latents.dtype)
        if key not in known or not torch.equal(known[key][0], positions):
            known[key] = positions, self.rotary(latents, positions, *kind)
        return known[key][1]


class LatentCausalLM(_Mixin):
    """A causal language model with layers that cache latents; comes before the stock class in the bases.

    ``config.cache_code`` describes a packed cache (`mea.models.coded_attention`): its ``reading``, the numbers of
    ``first`` and ``recent`` tokens that are exact, and for each layer its ``tiers``, or None for an ordinary layer.
    Otherwise ``config.latent_ranks`` holds ``[r_k, r_v]`` per layer, or None for an uncompressed layer;
    ``config.latent_form`` is a name in `mea.ops.cache_forms.FORMS`; ``config.latent_groups`` is the number of groups of
    heads with separate latents. With ``config.head_norm_eps`` every layer has a `NormedProjection`.
    """

    _supports_attention_backend = False  # see `is_backend_compatible`
    _tp_plan: dict[str, str] = {}  # noqa: RUF012 (mixing spans all heads, or those of a group: a split by heads would be wrong)

    def __init__(self, config: Any):
        super().__init__(config)
        if hasattr(config, "latent_widths") or config.latent_form in ("rotated", "unrotated"):
            raise ValueError(
                "an older version of mea made this model (its configuration has latent_widths, or the latent_form "
                "rotated or unrotated): compress the original again with mea compress MODEL OUT"
            )
        if config.cache_code is not None:
            self._pack_cache(config.cache_code)
        elif len(config.latent_ranks or ()) != config.num_hidden_layers:
            raise ValueError(
                f"config.latent_ranks must give [r_k, r_v] or null for each of the {config.num_hidden_layers} layers, "
                f"not {config.latent_ranks!r}"
            )
        ranks_by_layer: Any = config.latent_ranks or ()
        for layer, ranks in zip(self.model.layers, ranks_by_layer, strict=False):
            if ranks is not None:
                form, (key_rank, value_rank) = {"form": config.latent_form, "groups": config.latent_groups}, ranks
                to_latent_attention(layer.self_attn, key_rank, value_rank, **form, rotary=self.model.rotary_emb)
        if config.head_norm_eps is not None:
            add_head_norm(self, config.head_norm_eps)
        self.post_init()

    def _pack_cache(self, code: dict[str, Any]) -> None:
        layers = self.model.layers
        if len(code["tiers"]) != len(layers):
            raise ValueError(
                f"config.cache_code must give tiers or null for each of the {len(layers)} layers, not {code['tiers']!r}"
            )
        for layer, tiers in zip(layers, code["tiers"], strict=True):
            if tiers is not None:
                to_coded_attention(layer.self_attn, code, tiers, self.model.rotary_emb)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        """As usual, then pack the cache at once: assisted decoding and static caches ask its layers what they are."""
        prepared = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        cache = model_kwargs.get("past_key_values")
        if self.config.cache_code is not None and cache is not None:
            all_dynamic(cache)
            for layer in self.model.layers:
                if isinstance(layer.self_attn, CodedAttention):
                    layer.self_attn.packed(cache)
        return prepared

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, HeadMixing):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load as in transformers, but raise an error if the checkpoint lacks weights."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(f"the checkpoint {args[0]} lacks {len(missing)} weights, such as {missing[0]}")
        return (model, info) if output_loading_info else model

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """Refuse engines that would read the cache with their own attention; they ask before they load a model."""
        raise NotImplementedError(
            "this model has a KV cache of its own, which an engine's attention cannot read: for vLLM, install the "
            "plugin into its environment with pip install 'mea[vllm]', or use generate()"
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse before the first request: the engine would turn a later error into an empty answer."""
        raise NotImplementedError(NO_PAGES)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save as usual, with the modelling file that loads the model where this package is not installed."""
        self.config.auto_map = auto_map(type(self.config).__name__, type(self).__name__)
        super().save_pretrained(save_directory, **kwargs)
        Path(save_directory, MODELLING_FILE).write_text(modelling_source(), encoding="utf-8")


def to_latent_attention(
    attention: Any,
    key_rank: int,
    value_rank: int,
    form: str = "post_rope",
    rotary: nn.Module | None = None,
    groups: int = 1,
) -> None:
    """Turn a stock attention module into one that caches latents, in place; the new weights are not fitted.

    `rotary` is the model's rotary embedding; layers that rotate when the cache is read get a copy of it. A new one made
    from the configuration could differ: casting a model to 16 bits rounds its frequencies.

    Raises
    ------
    TypeError
        The module is not of a supported architecture.
    ValueError
        There is no such form, it does not support the ranks, or the groups do not divide heads and ranks.
    """
    stock = type(attention)
    latent_class = LATENT_ATTENTION.get(stock)
    if latent_class is None:
        raise TypeError(f"{stock.__name__} cannot cache latents; supported: {', '.join(SUPPORTED)}")
    if form not in FORMS:
        raise ValueError(f"the cache forms are {', '.join(FORMS)}, not {form!r}")
    FORMS[form].check(key_rank, value_rank, groups)
    weight = attention.k_proj.weight
    heads = weight.shape[0] // attention.head_dim
    if any(number % groups for number in (heads, key_rank, value_rank)):
        raise ValueError(f"{groups} groups must divide {heads} kv heads and ranks of [{key_rank}, {value_rank}] evenly")
    with torch.device(weight.device):
        mixing = HeadMixing(heads, attention.head_dim, key_rank, value_rank, form, groups)
        has_bias, encoded = attention.v_proj.bias is not None, groups * mixing.value_decoder.shape[-1]
        v_proj = nn.Linear(attention.v_proj.in_features, encoded, bias=has_bias)
    if FORMS[form].pre_rope:
        if rotary is None:
            raise ValueError("a cache of pre-RoPE keys needs the model's rotary embedding")
        attention.rotary = copy.deepcopy(rotary).to(weight.device)
    attention.head_mixing = mixing.to(weight.dtype)
    attention.v_proj = v_proj.to(weight.dtype)
    attention.__class__ = latent_class


def to_coded_attention(attention: Any, code: dict[str, Any], tiers: list[list[int]], rotary: nn.Module) -> None:
    """Turn a stock attention module into one that packs its cache, in place; the new weights are not fitted.

    `code` is as ``config.cache_code``, `tiers` is its entry for this layer (`mea.models.coded_attention`), and `rotary`
    the model's rotary embedding, of which the layer gets a copy.

    Raises
    ------
    TypeError
        The module is not of a supported architecture.
    ValueError
        There is no such reading.
    """
    stock = type(attention)
    if stock not in CODED_ATTENTION:
        raise TypeError(f"{stock.__name__} cannot pack its cache; supported: {', '.join(SUPPORTED)}")
    if code["reading"] not in CODES:
        raise ValueError(f"the readings of a packed cache are {', '.join(CODES)}, not {code['reading']!r}")
    weight = attention.k_proj.weight
    heads = weight.shape[0] // attention.head_dim
    with torch.device(weight.device):
        attention.code = CODES[code["reading"]](heads, attention.head_dim, tiers).to(weight.dtype)
    attention.exact = (code["first"], code["recent"])
    attention.rotary = copy.deepcopy(rotary).to(weight.device)
    attention.__class__ = CODED_ATTENTION[stock]


def auto_map(config_class: str, model_class: str) -> dict[str, str]:
    """The entry of the configuration that tells the Auto classes where to find the remote code."""
    module = MODELLING_FILE.removesuffix(".py")
    return {"AutoConfig": f"{module}.{config_class}", "AutoModelForCausalLM": f"{module}.{model_class}"}


def modelling_source() -> str:
    """The text of the self-contained modelling file: this module and the mathematics that it imports."""
    own = Path(__file__).read_text(encoding="utf-8")
    body = ast.parse(own).body
    ours = [node for node in body if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mea.")]
    if not ours:  # this is that file
        return own
    lines = own.splitlines()
    head, rest = lines[: ours[0].lineno - 1], lines[ours[-1].end_lineno or ours[-1].lineno :]
    shim = ["", "class Float:", '    """Stands for a tensor type that states a shape."""', ""]
    shim += ["    def __class_getitem__(cls, item):", "        return Tensor", "", ""]
    shim += ["Bool = Int = UInt8 = BFloat16 = Float", ""]
    shim += ["cpu: Any = None  # the package's own kernels need the package", "gpu: Any = None", "", ""]
    imports, bodies = zip(
        *map(_parts, (latent, cache_forms, codes, packed_cache, layer_code, coded_attention)), strict=True
    )
    extra = dict.fromkeys(line for lines in imports for line in lines)
    return "\n".join([*head, *extra, *shim, *(line for lines in bodies for line in lines), *rest, ""])


def _parts(module: Any) -> tuple[list[str], list[str]]:
    """The lines of a module's source: imports that are not this package's or its shims, and all after the imports."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    lines = source.splitlines()
    imports = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    ours = [getattr(node, "module", "").split(".")[0] in ("mea", "jaxtyping") for node in imports]
    kept = [ast.unparse(node) for node, own in zip(imports, ours, strict=True) if not own]
    return kept, lines[imports[-1].end_lineno :]


LATENT_ATTENTION: dict[type, type] = {}
CODED_ATTENTION: dict[type, type] = {}
COMPRESSED_CONFIGS: dict[str, type] = {}
COMPRESSED_MODELS: dict[str, type] = {}


def _define(model_type: str, config_name: str, prefix: str) -> None:
    """Define the configuration, attention and model classes of one architecture, under importable names."""
    stock_config, stock_model = getattr(transformers, config_name), getattr(transformers, f"{prefix}ForCausalLM")
    stock_attention = getattr(sys.modules[stock_model.__module__], f"{prefix}Attention")
    fields = {
        "__module__": __name__,
        "__annotations__": {
            "latent_ranks": "list | None",
            "latent_form": "str",
            "latent_groups": "int",
            "cache_code": "dict | None",
            "compression": "dict | None",
            "head_norm_eps": "float | None",
        },
        "latent_ranks": None,
        "latent_form": "post_rope",
        "latent_groups": 1,
        "cache_code": None,
        "head_norm_eps": None,
        "compression": None,
        "model_type": MODEL_TYPE_PREFIX + model_type,
        "base_model_tp_plan": None,
    }
    config = type(f"Mea{config_name}", (stock_config,), fields)
    attention = type(f"Mea{prefix}Attention", (LatentAttention, stock_attention), {"__module__": __name__})
    coded = type(f"MeaCoded{prefix}Attention", (CodedAttention, stock_attention), {"__module__": __name__})
    model = type(
        f"Mea{prefix}ForCausalLM", (LatentCausalLM, stock_model), {"__module__": __name__, "config_class": config}
    )
    globals().update({cls.__name__: cls for cls in (config, attention, coded, model)})
    LATENT_ATTENTION[stock_attention] = attention
    CODED_ATTENTION[stock_attention] = coded
    COMPRESSED_CONFIGS[model_type] = config
    COMPRESSED_MODELS[model_type] = model


def register() -> None:
    """Register the compressed models with ``AutoConfig`` and ``AutoModelForCausalLM``."""
    for model_type, config in COMPRESSED_CONFIGS.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, COMPRESSED_MODELS[model_type], exist_ok=True)


for _model_type, _names in SUPPORTED.items():
    _define(_model_type, *_names)
