"""Shapes and variants as data: which models are compared, and at which sizes.

A preset is the shape of a plain Transformer. A variant is an attention method with its options. `preset` puts them
together; where a method needs more or fewer attention parameters than the plain one, the feed-forward layer gives or
takes the difference, so that every variant of a shape has the same number of parameters within 1 %.
"""

from typing import Any

from mea.models.accounting import parameters
from mea.models.config import MeaConfig
from mea.names import did_you_mean

# Head counts are even everywhere and there are four key/value heads or more: Differential V1 pairs them, and half of
# them are still more than one component.
SHAPES: dict[str, dict[str, Any]] = {
    "1m": {
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "3m": {
        "vocab_size": 4096,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "10m": {
        "vocab_size": 8192,
        "hidden_size": 384,
        "intermediate_size": 896,
        "num_hidden_layers": 5,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "30m": {
        "vocab_size": 16384,
        "hidden_size": 512,
        "intermediate_size": 1280,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "125m": {
        "vocab_size": 32768,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    # The paper's (arXiv 2601.19611): LLaMA-3.2-1B with input and output embeddings of their own.
    "paper": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
    },
}

# Names of the paper's arms, and beyond them: `mea_half` trains with half as many component heads, `mea_shared` with the
# same components for keys and values: half of the cache, as `gqa_half`. With `_small_gain` heads start about as loud as
# they are without a norm (docs/LOG.md: from 1 on, short trainings do worse than without).
SMALL_GAIN = {"head_norm_init": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "transformer": {"attention": "gqa"},
    "gqa_half": {"attention": "gqa", "num_key_value_heads": "half"},
    "mqa": {"attention": "gqa", "num_key_value_heads": 1},
    "groupnorm": {"attention": "gqa", "attention_options": {"head_norm": "shared_gain"}},
    "groupnorm_small_gain": {"attention": "gqa", "attention_options": {"head_norm": "shared_gain"} | SMALL_GAIN},
    "mea": {"attention": "mea"},
    "mea_small_gain": {"attention": "mea", "attention_options": SMALL_GAIN},
    "mea_no_norm": {"attention": "modified_talking_heads"},
    "mea_keys": {"attention": "mea", "attention_options": {"mix": "keys"}},
    "mea_values": {"attention": "mea", "attention_options": {"mix": "values"}},
    "mea_keys_no_norm": {"attention": "mea", "attention_options": {"mix": "keys", "head_norm": "off"}},
    "mea_values_no_norm": {"attention": "mea", "attention_options": {"mix": "values", "head_norm": "off"}},
    "mea_frequency": {"attention": "mea", "attention_options": {"key_mixing": "frequency"}},
    "mea_half": {"attention": "mea", "attention_options": {"num_component_heads": "half"}},
    "mea_shared": {"attention": "mea", "attention_options": {"share_components": True}},
    "mea_shared_half": {
        "attention": "mea",
        "attention_options": {"share_components": True, "num_component_heads": "half"},
    },
    "differential_v1": {"attention": "differential_v1"},
    "differential_v2": {"attention": "differential_v2"},
    "talking_heads": {"attention": "talking_heads"},
    "gated": {"attention": "gated"},
    "knocking_heads": {"attention": "knocking_heads"},
    "interleaved_heads": {"attention": "interleaved_heads"},
}
FFN_STEP = 8  # widths of feed-forward layers stay multiples of this


def preset(shape: str, variant: str = "transformer", **changes: Any) -> MeaConfig:
    """The configuration of a shape with a variant of attention.

    Parameters
    ----------
    shape, variant
        Keys of `SHAPES` and `VARIANTS`.
    changes
        Other fields of `MeaConfig`, such as ``vocab_size`` for the tokenizer at hand. Variants still match each other.

    Raises
    ------
    ValueError
        For a name that is not in the tables; the message names the nearest.
    """
    fields = {**_lookup("shape", SHAPES, shape), **changes}
    plain = MeaConfig(**fields, **VARIANTS["transformer"])
    chosen = dict(_lookup("variant", VARIANTS, variant))
    options = dict(chosen.pop("attention_options", {}))
    for heads, name in ((options, "num_component_heads"), (chosen, "num_key_value_heads")):
        if heads.get(name) == "half":
            heads[name] = max(1, (plain.num_key_value_heads or 1) // 2)
    config = MeaConfig(**{**fields, **chosen, "attention_options": options})
    per_step = 3 * config.hidden_size * config.num_hidden_layers * FFN_STEP
    config.intermediate_size -= FFN_STEP * round((parameters(config) - parameters(plain)) / per_step)
    return config


def _lookup(kind: str, table: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    if name not in table:
        raise ValueError(f"no {kind} is called {name!r}: there are {', '.join(table)}{did_you_mean(name, table)}")
    return table[name]


def parameter_table() -> list[tuple[str, str, int, int, float]]:
    """Rows of shape, variant, feed-forward width, parameters, and these relative to the plain Transformer's."""
    rows = []
    for shape in SHAPES:
        plain = parameters(preset(shape))
        for variant in VARIANTS:
            config = preset(shape, variant)
            count = parameters(config)
            rows.append((shape, variant, config.intermediate_size, count, count / plain - 1))
    return rows
