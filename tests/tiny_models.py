"""Tiny random models of every supported architecture, and compressed ones made from them with random factors."""

import copy
from typing import Any

import torch
import transformers

from mea.compression.budget import Layout
from mea.compression.convert import assemble, latent_config
from mea.compression.methods.factors import Factors, LayerFactors
from mea.models.latent_attention import SUPPORTED
from mea.ops.cache_forms import FORMS

VOCABULARY, WIDTH, WINDOW = 99, 24, 8  # 3 kv heads of 8
FULL = ((WIDTH, WIDTH),) * 3
REDUCED = ((16, 16), None, (12, 20))
EVEN = ((16, 16), None, (12, 12))  # as joint latents must be
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
PECULIAR: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "gemma3_text": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 12,
    },
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
}
SLIDING = ("mistral", "gemma3_text")


def stock(model_type: str, **changes: Any) -> Any:
    """A model with every parameter away from its initial value: biases, norms and all."""
    config_name, prefix = SUPPORTED[model_type]
    config = getattr(transformers, config_name)(**{**SHAPE, **PECULIAR.get(model_type, {}), **changes})
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_factors(width: int) -> Factors:
    """Some of the coordinates in a random orthonormal basis."""
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64)).Q
    return Factors(basis[:width], basis[:width].T)


def joint_factors(width: int) -> tuple[Factors, Factors]:
    """Of one latent for keys and values."""
    basis = torch.linalg.qr(torch.randn(2 * WIDTH, 2 * WIDTH, dtype=torch.float64)).Q[:width]
    keys, values = basis.split(WIDTH, dim=1)
    return Factors(keys, keys.T), Factors(values, values.T)


def compress(model: Any, ranks: tuple = REDUCED, form: str = "post_rope") -> Any:
    """The same model with latents of these ranks; it shares no tensor with the original."""

    def factors(pair: tuple[int, int]) -> LayerFactors:
        both = joint_factors(sum(pair)) if form == "joint" else map(random_factors, pair)
        return LayerFactors(*both, form=FORMS[form])

    config = latent_config(model.config, Layout(tuple(ranks)), {}, FORMS[form])
    return assemble(copy.deepcopy(model), [None if pair is None else factors(pair) for pair in ranks], config)


def tokens(batch: int = 2, length: int = 13) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, length))


def generate(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, **options)
