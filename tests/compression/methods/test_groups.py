"""Groups of heads with latents of their own: any method, block by block, and each group alone is one rank's part."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

import mea
from compression.small import planned, tiny
from mea.compression.methods import METHODS
from mea.evaluate.speed import cache_size
from mea.models.latent_attention import to_latent_attention
from mea.ops.latent import encode, materialise, read

GROUPS = 2
DIVISIBLE = [name for name, method in METHODS.items() if not (method.coded or method.form.shared)]


@pytest.fixture(params=DIVISIBLE)
def small(request, tokenizer, calibration):
    return mea.compress(tiny(), tokenizer, method=request.param, groups=GROUPS, keep=0.5, calibration=calibration)


@torch.no_grad()
def test_every_method_makes_groups(small, tmp_path):
    """Read in one go, token by token, and after saving: the same. What is cached is what the layout says."""
    assert small.config.latent_groups == small.config.compression["groups"] == GROUPS
    tokens = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(1))
    whole = small(tokens).logits
    past, steps = None, []
    for token in tokens.split(1, dim=1):
        output = small(token, past_key_values=past, use_cache=True)
        past = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=2e-5 * whole.abs().max().item())
    assert past.layers[0].keys.shape[:2] == (2, GROUPS)
    assert cache_size(small, 24).bytes_per_token == 4 * sum(map(sum, small.config.latent_ranks))
    small.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, whole)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_absorbed_is_materialised_with_padding(tokenizer, calibration, implementation):
    small = mea.compress(tiny(), tokenizer, method="post_rope", groups=GROUPS, keep=0.5, calibration=calibration)
    small.set_attn_implementation(implementation)
    tokens = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    outputs = []
    for reading in ("absorbed", "materialised"):
        for layer in small.model.layers:
            layer.self_attn.reading = reading
        outputs.append(small(tokens, attention_mask=mask).logits[mask.bool()])
    torch.testing.assert_close(*outputs, rtol=0, atol=2e-5 * outputs[0].abs().max().item())


def part(attention, config, place: int):
    """What one rank holds of a compressed attention, as a module of its own: rows of what comes in, columns of W_O."""
    mixing, half = attention.head_mixing, copy.deepcopy(config)
    half.num_attention_heads //= GROUPS
    half.num_key_value_heads //= GROUPS
    half.head_dim = attention.head_dim
    own = LlamaAttention(half, 0)
    width = len(mixing.key_encoder), attention.v_proj.weight.shape[0]
    to_latent_attention(own, *(number // GROUPS for number in width))
    cut = {
        name: tensor.chunk(GROUPS, dim=int(name == "o_proj.weight"))[place]
        for name, tensor in attention.state_dict().items()
    }
    own.load_state_dict(cut)
    return own.double()


@torch.no_grad()
def test_each_group_is_the_part_of_one_rank(tokenizer, calibration):
    small = mea.compress(
        tiny(), tokenizer, method="post_rope", groups=GROUPS, keep=0.5, calibration=calibration
    ).double()
    config = LlamaConfig(**tiny().config.to_dict())
    config._attn_implementation = "sdpa"
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    position = small.model.rotary_emb(x, torch.arange(9)[None])
    for layer in small.model.layers:
        whole, _ = layer.self_attn(x, position)
        parts = [part(layer.self_attn, config, place)(x, position)[0] for place in range(GROUPS)]
        torch.testing.assert_close(sum(parts), whole, rtol=0, atol=1e-12)


def test_refinement_keeps_groups(tokenizer, calibration):
    options = {"method": "post_rope", "groups": GROUPS, "keep": 0.5, "calibration": calibration}
    small = mea.compress(tiny(), tokenizer, refine=1, **options)
    assert small.model.layers[0].self_attn.head_mixing.key_encoder.shape == (16, 16)


@torch.no_grad()
def test_operations_on_groups_are_those_on_blocks():
    """Dense matrices that are zero between groups say what grouped ones have to give."""
    b, g, t, d, r = 2, 6, 5, 4, 3
    heads, n = torch.randn(b, g, t, d, dtype=torch.float64), g * d // GROUPS
    encoders, decoders = torch.randn(GROUPS, r, n).double(), torch.randn(g, d, r).double()
    dense = torch.block_diag(*encoders)
    latents = encode(heads, encoders.flatten(0, 1))
    assert torch.allclose(latents.transpose(1, 2).flatten(2), encode(heads, dense)[:, 0])
    blocks = torch.block_diag(*decoders.view(GROUPS, n, r)).view(g, d, GROUPS * r)
    assert torch.allclose(materialise(latents, decoders), materialise(encode(heads, dense), blocks))
    queries = torch.randn(b, GROUPS, 7, r).double()
    alone = [read(*(x[:, i : i + 1] for x in (queries, latents, latents)), 0.3) for i in range(GROUPS)]
    assert torch.allclose(read(queries, latents, latents, 0.3), torch.cat(alone, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 3}, "cannot be divided into 3"),
        ({"groups": 0}, "cannot be divided into 0"),
        ({"groups": 2, "method": "shared"}, "keys and values of all heads"),
        ({"groups": 4, "method": "svd"}, "give fewer groups"),
        ({"groups": 4, "keep": 0.1}, "no layout meets"),
    ],
)
def test_what_cannot_be_grouped_is_refused_before_any_work(calibration, options, message):
    with pytest.raises(ValueError, match=message):
        planned(tiny().config, calibration=calibration, **options)
