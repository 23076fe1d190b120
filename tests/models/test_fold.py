"""A square mixing disappears, and without a norm what is left is a stock Llama."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from mea.models.config import MeaConfig
from mea.models.decoder import MeaForCausalLM, register
from mea.models.fold import fold

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 12,
}
TERMS = 2 * (4 * 48 + 2 * 64 + 4 * 12 * 8 + 2 * 11) + 48  # as in the decoder's tests


def build(**fields) -> MeaForCausalLM:
    model = MeaForCausalLM(MeaConfig(**SHAPE, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "fields",
    [
        {"attention": "modified_talking_heads"},
        {"attention": "mea", "attention_options": {"head_norm": "off"}, "attention_bias": True},
        {"attention": "mea", "attention_options": {"head_norm": "off", "key_mixing": "frequency"}},
        {"attention": "mea", "attention_options": {"head_norm": "off", "mix": "values"}, "tie_word_embeddings": True},
        {"attention": "gqa", "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        {"attention": "knocking_heads", "attention_bias": True},
        {"attention": "knocking_heads", "attention_options": {"on": "v"}},
    ],
)
def test_without_norm_the_result_is_a_stock_llama(fields, tmp_path, agree):
    model, ids = build(**fields), torch.randint(0, 97, (2, 11))
    folded = fold(model)
    assert type(folded) is LlamaForCausalLM
    agree(folded(ids).logits, model(ids).logits, TERMS)
    folded.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(stock) is LlamaForCausalLM
    assert torch.equal(stock(ids).logits, folded(ids).logits)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attention_options": {"head_norm": "per_head_gain", "qk_norm": True}},
        {"attention_options": {"head_norm": "off", "qk_norm": True}},
        {"attention_options": {"head_norm": "off"}, "sliding_window": 5},
        {"attention_options": {"head_norm": "off"}, "rope_parameters": {"partial_rotary_factor": 0.5}},
        {"attention_options": {"head_norm": "off"}, "rope_parameters": {"rope_type": "none"}},
        {"attention": "knocking_heads", "attention_options": {"qk_norm": True}},
    ],
)
def test_with_a_norm_it_is_grouped_attention_of_this_package(fields, tmp_path, agree):
    register()
    model, ids = build(**{"attention": "mea", **fields}), torch.randint(0, 97, (2, 11))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    folded = fold(model)
    assert type(folded) is MeaForCausalLM
    assert folded.config.attention == "gqa"
    assert not any("mixing" in name for name in folded.state_dict())
    agree(folded(ids).logits, model(ids).logits, TERMS)
    assert all(torch.equal(model.state_dict()[name], x) for name, x in before.items()), "the model given is unchanged"
    folded.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, folded(ids).logits)


def test_what_does_not_fold_is_refused():
    with pytest.raises(ValueError, match="'differential_v1' does not fold"):
        fold(build(attention="differential_v1"))
    with pytest.raises(ValueError, match="only a square mixing folds"):
        fold(build(attention="mea", attention_options={"num_component_heads": 2}))
    with pytest.raises(ValueError, match="4 shared component heads for 4 key/value heads do not fold"):
        fold(build(attention="mea", attention_options={"share_components": True}))
