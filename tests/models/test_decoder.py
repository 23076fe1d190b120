"""The decoder as an ordinary Hugging Face model: generation, caches, saving, training, backends."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    Trainer,
    TrainingArguments,
)

from mea.models.config import MeaConfig
from mea.models.decoder import MeaForCausalLM, register

TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 12,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
KINDS = {
    "gqa": {"attention": "gqa"},
    "gqa-norm-qk_norm": {"attention": "gqa", "attention_options": {"head_norm": "per_head_gain", "qk_norm": True}},
    "mea": {"attention": "mea", "attention_options": {"init": "orthogonal"}},
    "mea-fewer": {"attention": "mea", "attention_options": {"num_component_heads": 2, "init": "scaled_random"}},
    "mea-fewer-keys": {"attention": "mea", "attention_options": {"num_component_heads": 2, "mix": "keys"}},
    "mea-frequency": {
        "attention": "mea",
        "attention_options": {"key_mixing": "frequency", "num_component_heads": 3, "init": "orthogonal"},
    },
    "mea-shared": {"attention": "mea", "attention_options": {"share_components": True, "init": "scaled_random"}},
    "mea-shared-fewer-qk_norm": {
        "attention": "mea",
        "attention_options": {"share_components": True, "num_component_heads": 3, "qk_norm": True},
    },
    "differential_v1": {"attention": "differential_v1"},
    "differential_v2": {"attention": "differential_v2"},
    "talking_heads": {"attention": "talking_heads", "attention_options": {"init": "orthogonal"}},
    "modified_talking_heads": {"attention": "modified_talking_heads", "attention_options": {"init": "orthogonal"}},
    "gated": {"attention": "gated"},
    "knocking_heads": {"attention": "knocking_heads"},
    "interleaved_heads": {"attention": "interleaved_heads", "attention_options": {"init": "orthogonal"}},
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
# Logits are sums over two layers of projections, scores and reads; rounding of all of them, see the fixture `agree`.
TERMS = 2 * (4 * 48 + 2 * 64 + 4 * 12 * 8 + 2 * 40) + 48


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register()


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def kind(request: pytest.FixtureRequest) -> dict:
    return request.param


def build(kind: dict, **changes) -> MeaForCausalLM:
    """A model with every parameter away from its initial value, larger than usual so that attention matters."""
    model = MeaForCausalLM(MeaConfig(**{**TINY, **kind, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(1, TINY["vocab_size"], (batch, length))


def generate(model, ids, **options) -> torch.Tensor:
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, **options)


def test_plain_attention_is_a_llama_checkpoint(agree):
    model = build(KINDS["gqa"], rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **LLAMA3})
    shared = {name: value for name, value in TINY.items() if name != "pad_token_id"}
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **LLAMA3}
    llama = LlamaForCausalLM(LlamaConfig(**shared, rms_norm_eps=1e-5, rope_parameters=rope))
    llama.load_state_dict(model.state_dict())
    ids = tokens(length=40)
    agree(model(ids).logits, llama(ids).logits, TERMS)


def test_generation_is_the_same_with_every_cache_and_without(kind):
    model, ids = build(kind), tokens()
    plain = generate(model, ids, use_cache=False)
    assert torch.equal(generate(model, ids), plain)
    assert torch.equal(generate(model, ids, cache_implementation="static", disable_compile=True), plain)


def test_a_sliding_window_generates_the_same_with_every_cache(kind):
    model, ids = build(kind, sliding_window=6), tokens()
    plain = generate(model, ids, use_cache=False)
    assert torch.equal(generate(model, ids), plain)
    assert torch.equal(generate(model, ids, cache_implementation="static", disable_compile=True), plain)
    full = build(kind)
    full.load_state_dict(model.state_dict())
    assert not torch.equal(full(ids).logits[:, -1], model(ids).logits[:, -1])


def test_left_padding_changes_no_continuation(kind):
    model, ids = build(kind), tokens()
    alone = generate(model, ids[:1, 4:])
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    batch = generate(model, ids * padding, attention_mask=padding)
    assert torch.equal(batch[:1, 4:], alone)


def test_beams_sampling_and_a_reused_prompt(kind):
    model, ids = build(kind), tokens(batch=1)
    beams = generate(model, ids, num_beams=3)
    assert torch.equal(generate(model, ids, num_beams=3, use_cache=False), beams)
    assert generate(model, ids, do_sample=True).shape == (1, 23)

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(tokens(batch=1, length=3), past_key_values=cache)
    cache.crop(-4)  # back to the prompt, less the token that generation feeds again
    assert torch.equal(generate(model, ids, past_key_values=cache), generate(model, ids))


def test_packed_rows_equal_rows_of_their_own(kind, agree):
    """Without a cache positions that start anew mark a new document, as Hugging Face's packing collators write them."""
    model, ids = build(kind), tokens(batch=1, length=20)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(part).logits for part in ids.split([8, 12], dim=1)], dim=1)
    agree(packed, alone, TERMS)


def test_saving_and_loading_by_auto_classes_loses_nothing(kind, tmp_path):
    model, ids = build(kind, tie_word_embeddings=True), tokens()
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict()["attention"] == kind["attention"]
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is MeaForCausalLM
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_initial_values_survive_the_construction_by_hugging_face():
    model = MeaForCausalLM(MeaConfig(**TINY, attention="mea"))
    attention = model.model.layers[0].self_attn
    assert torch.equal(attention.key_mixing.weight, torch.eye(4))
    assert torch.equal(attention.head_norm.weight, torch.ones(12))
    assert abs(attention.q_proj.weight.std().item() / 0.02 - 1) < 0.1
    knocking = MeaForCausalLM(MeaConfig(**TINY, attention="knocking_heads")).model.layers[0].self_attn
    assert torch.equal(knocking.query_mixing.weight, torch.eye(12))
    differential = MeaForCausalLM(MeaConfig(**TINY, attention="differential_v1")).model.layers[1].self_attn
    assert 0 < differential.lambda_q1.abs().max() < 0.5


@pytest.mark.parametrize("method", ["gqa", "mea", "differential_v1"])
def test_the_gain_of_the_head_norm_starts_where_it_is_told_to_and_no_other(method, tmp_path):
    options = {"head_norm_init": 0.1, "qk_norm": True} | ({"head_norm": "shared_gain"} if method == "gqa" else {})
    model = MeaForCausalLM(MeaConfig(**TINY, attention=method, attention_options=options))
    attention = model.model.layers[1].self_attn
    assert (attention.head_norm.weight == 0.1).all()
    assert (attention.q_norm.weight == 1).all()
    torch.nn.init.constant_(attention.head_norm.weight, 0.7)
    model.save_pretrained(tmp_path)
    loaded = MeaForCausalLM.from_pretrained(tmp_path)
    assert (loaded.model.layers[1].self_attn.head_norm.weight == 0.7).all()


def test_embeddings_are_tied_only_when_asked():
    untied = MeaForCausalLM(MeaConfig(**TINY))
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_checkpointing_gives_the_same_gradients(kind):
    model, ids = build(kind).train(), tokens()

    def grads() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = grads()
    model.gradient_checkpointing_enable()
    repeated = grads()
    assert all(torch.equal(repeated[name], grad) for name, grad in plain.items())


def test_trainer_lowers_the_loss(tmp_path):
    model = MeaForCausalLM(MeaConfig(**TINY, attention="mea"))
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(24).remainder(5).add(1).repeat(8, 1)]
    before = model(rows[0]["input_ids"][None], labels=rows[0]["labels"][None]).loss.item()
    arguments = TrainingArguments(
        tmp_path,
        max_steps=20,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        gradient_checkpointing=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    Trainer(model, arguments, train_dataset=rows).train()
    model.eval()
    after = model(rows[0]["input_ids"][None], labels=rows[0]["labels"][None]).loss.item()
    assert after < before / 4


def test_changing_the_backend_changes_no_logits(kind, agree):
    model, ids = build(kind), tokens()
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    reference = model(ids, attention_mask=padding).logits
    model.set_attn_implementation("eager")
    agree(model(ids, attention_mask=padding).logits[:, 4:], reference[:, 4:], TERMS)
    loaded = MeaForCausalLM._from_config(model.config, attn_implementation="eager")
    assert loaded.model.layers[0].self_attn.backend == "eager"


def test_hidden_states_are_returned_on_request():
    model, ids = build(KINDS["mea"]), tokens()
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == TINY["num_hidden_layers"] + 1
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)


def test_few_logits_are_the_last_ones(agree):
    model, ids = build(KINDS["mea"]), tokens()
    agree(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:], TERMS)


def test_without_position_embedding_the_order_of_past_tokens_does_not_matter(agree):
    """One layer: a deeper one sees order through the causal mask."""
    model = build(KINDS["mea"], num_hidden_layers=1, rope_parameters={"rope_type": "none"})
    ids = tokens(batch=1)
    shuffled = torch.cat([ids[:, :-1].flip(1), ids[:, -1:]], dim=1)
    agree(model(shuffled).logits[:, -1], model(ids).logits[:, -1], TERMS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "gpa"}, "did you mean 'gqa'"),
        ({"attention": "gqa", "attention_options": {"head_nrom": "off"}}, "do not suit 'gqa'.*head_nrom"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
    ],
)
def test_wrong_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MeaForCausalLM(MeaConfig(**{**TINY, **options}))


def test_wrong_backends_are_refused():
    with pytest.raises(ValueError, match="must be one of eager, sdpa, flex_attention"):
        build(KINDS["mea"]).set_attn_implementation("flash_attention_2")
    with pytest.raises(ValueError, match="runs by eager only"):
        build(KINDS["talking_heads"]).set_attn_implementation("sdpa")


@pytest.mark.compile
@pytest.mark.parametrize("name", ["mea", "mea-fewer"])
def test_a_training_step_compiles_to_one_graph(name):
    model, ids = build(KINDS[name]).train(), tokens(length=40)
    eager = model(ids, labels=ids).loss
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(ids, labels=ids).loss
    loss.backward()
    assert abs(loss - eager) <= TERMS * torch.finfo(torch.float32).eps * eager


@pytest.mark.compile
@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["mea", "mea-fewer", "mea-shared", "differential_v1", "talking_heads", "interleaved_heads"]
)
def test_decoding_on_a_static_cache_compiles_to_one_graph(name, agree):
    model, ids = build(KINDS[name]), tokens(length=11)
    torch.compiler.reset()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = StaticCache(config=model.config, max_cache_len=24)
    model(ids[:, :8], past_key_values=cache)
    steps = [step(ids[:, i : i + 1], past_key_values=cache).logits for i in range(8, 11)]
    agree(torch.cat(steps, dim=1), model(ids, use_cache=False).logits[:, 8:], TERMS)


@pytest.mark.compile
@torch.no_grad()  # on a CPU FlexAttention has a forward pass only
def test_flex_attention_with_padding_and_a_window(agree):
    """FlexAttention traces its mask function even outside torch.compile: hence among these tests."""
    model, ids = build(KINDS["mea"], sliding_window=6), tokens()
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    for mask, first in ((padding, 4), (None, 0)):
        expected = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("flex_attention")
        agree(model(ids, attention_mask=mask).logits[:, first:], expected[:, first:], TERMS)
        model.set_attn_implementation("sdpa")
