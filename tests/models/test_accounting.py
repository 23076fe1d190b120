"""Closed forms against counts of the real thing, and the presets' promise of equal parameters."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mea.models.accounting import (
    GPUS,
    LLAMAS,
    Gpu,
    Reading,
    Shape,
    cache_bytes_per_token,
    decode_flops,
    joint_reading,
    parameters,
    plain_reading,
    predictive_reading,
    step_seconds,
    tokens_for_speedup,
    tokens_that_fit,
    training_flops,
)
from mea.models.config import MeaConfig
from mea.models.decoder import MeaForCausalLM
from mea.models.presets import SHAPES, VARIANTS, parameter_table, preset
from mea.ops.codes import bits_per_token
from mea.ops.triton import Angles, CodedTokens, reference

# What the variants leave out: every option that changes a count.
OTHERS = {
    "bias": MeaConfig(attention="mea", attention_bias=True, attention_options={"fold": "always"}),
    "qk_norm": MeaConfig(attention="gqa", attention_options={"qk_norm": True, "head_norm": "per_head_gain"}),
    "fewer-qk_norm": MeaConfig(attention="mea", attention_options={"qk_norm": True, "num_component_heads": 2}),
    "fewer-keys": MeaConfig(attention="mea", attention_options={"mix": "keys", "num_component_heads": 2}),
    "fewer-values": MeaConfig(attention="mea", attention_options={"mix": "values", "num_component_heads": 3}),
    "fewer-frequency": MeaConfig(
        attention="mea", attention_options={"key_mixing": "frequency", "num_component_heads": 2, "fold": "never"}
    ),
    "shared-qk_norm": MeaConfig(attention="mea", attention_options={"qk_norm": True, "share_components": True}),
    "shared-frequency-fewer": MeaConfig(
        attention="mea",
        attention_options={"key_mixing": "frequency", "num_component_heads": 3, "share_components": True},
    ),
    "fewer-frequency-keys": MeaConfig(
        attention="mea", attention_options={"key_mixing": "frequency", "num_component_heads": 2, "mix": "keys"}
    ),
}
SMALL = {"vocab_size": 97, "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 12}


def small(config: MeaConfig, kv_heads: int = 4) -> MeaConfig:
    fields = {**SMALL, "num_attention_heads": 8, "num_key_value_heads": kv_heads, "tie_word_embeddings": False}
    for name, value in fields.items():
        setattr(config, name, value)
    return config


PRESETS = {variant: preset("1m", variant) for variant in VARIANTS}
CONFIGS = {
    **{variant: small(config, config.num_key_value_heads) for variant, config in PRESETS.items()},
    **{name: small(config) for name, config in OTHERS.items()},
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request: pytest.FixtureRequest) -> MeaConfig:
    request.param._attn_implementation = "eager"  # the counter knows no fused attention on a CPU
    return request.param


def test_parameters(config):
    assert parameters(config) == sum(p.numel() for p in MeaForCausalLM(config).parameters())


@pytest.mark.parametrize("tokens", [31, 120], ids=["few tokens", "many tokens"])  # either side of where mixing folds
def test_training_flops(config, tokens):
    ids = torch.randint(0, 97, (2, tokens))
    model = MeaForCausalLM(config)
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    assert training_flops(config, 2, tokens) == counter.get_total_flops()


@torch.no_grad()
def test_cache_bytes_and_decode_flops(config):
    model = MeaForCausalLM(config).eval()
    ids = torch.randint(0, 97, (1, 50))
    cache = model(ids, use_cache=True).past_key_values
    held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    assert held == 50 * cache_bytes_per_token(config, bytes_per_number=4)
    with FlopCounterMode(display=False) as counter:
        model(ids[:, :1], past_key_values=cache)
    assert decode_flops(config, 51) == counter.get_total_flops()


def test_every_variant_of_a_shape_has_the_same_parameters_within_one_percent():
    rows = parameter_table()
    assert len(rows) == len(SHAPES) * len(VARIANTS)
    for shape, variant, _, count, relative in rows:
        assert abs(relative) < 0.01, f"{shape} {variant}: {count:,} parameters, {relative:+.2%}"


@pytest.mark.parametrize(
    ("shape", "millions"), [("1m", 1), ("3m", 3), ("10m", 10), ("30m", 30), ("125m", 125), ("paper", 1498)]
)
def test_shapes_are_as_large_as_their_names(shape, millions):
    assert parameters(preset(shape)) == pytest.approx(millions * 1e6, rel=0.06)


def test_the_papers_shape_is_llama_1b_with_both_embeddings():
    """Llama 3.2 1B has 1,235,814,400 parameters with one embedding of 128,256 × 2048."""
    assert parameters(preset("paper")) == 1_235_814_400 + 128_256 * 2048


def test_variants_with_smaller_caches():
    """Each half has plain attention of the same bytes beside it, and a quarter too where there are four kv heads."""
    for shape in SHAPES:
        full = cache_bytes_per_token(preset(shape, "mea"))
        half = {cache_bytes_per_token(preset(shape, variant)) for variant in ("mea_half", "mea_shared", "gqa_half")}
        assert half == {full // 2}
        assert 4 * cache_bytes_per_token(preset(shape, "mea_shared_half")) == full
        mqa = preset(shape, "mqa")
        assert cache_bytes_per_token(mqa) * preset(shape).num_key_value_heads == full


def test_a_change_of_vocabulary_keeps_the_variants_together():
    plain = parameters(preset("3m", vocab_size=256))
    assert all(abs(parameters(preset("3m", variant, vocab_size=256)) / plain - 1) < 0.01 for variant in VARIANTS)


def test_wrong_names_get_a_hint():
    with pytest.raises(ValueError, match=r"no shape is called '30M'.*did you mean '30m'"):
        preset("30M")
    with pytest.raises(ValueError, match=r"no variant is called 'transfomer'.*did you mean 'transformer'"):
        preset("3m", "transfomer")


SMALL_SHAPE = Shape("small", layers=2, heads=8, kv_heads=4, head_dim=16, parameters=1e6)


def test_bytes_of_a_packed_token_are_those_of_its_codes():
    """Components of one layer in chosen tiers, against the count of bits in storage."""
    tiers = (64, 32, 16)
    keep = bits_per_token(tiers) / (2 * 4 * 16 * 16)
    reading = predictive_reading(SMALL_SHAPE, keep, sum(tiers) / 128, 64 / 128)
    assert reading.stored == bits_per_token(tiers) / 8
    assert joint_reading(SMALL_SHAPE, keep, sum(tiers) / 128).stored == reading.stored


def test_products_of_reading_are_those_of_the_definition():
    """Counted in PyTorch: scores and averages of one new token over many."""
    shape, n = SMALL_SHAPE, 64
    for paired in (True, False):
        groups, r_k = [(8, 64), (4, 48)], 64
        decoder = torch.zeros(4, r_k // 2, 2) if paired else torch.zeros(4, 16, 112)
        frequency = torch.zeros(r_k // 2, dtype=torch.int32) if paired else None
        tokens = CodedTokens(torch.zeros(1, n, 88, dtype=torch.uint8), torch.zeros(1, n, 4).bfloat16(), 0, n)
        angle = torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)
        places = torch.zeros(64, 8), torch.zeros(64, 8)
        maps = reference.Maps(groups, decoder, torch.zeros(4, 16), frequency)
        with FlopCounterMode(display=False) as counter:
            reference.read(maps, torch.zeros(1, 8, 1, 16), tokens, Angles(angle, places), 1.0)
        reading = predictive_reading(shape, 0.2, 112 / 128, 0.5) if paired else joint_reading(shape, 0.2, 112 / 128)
        assert counter.get_total_flops() == n * reading.products


def test_a_reading_takes_as_long_as_its_slowest_part():
    gpu = Gpu("some", memory=1e10, bandwidth=100.0, products=1000.0, vector=10.0)
    assert (Reading(1, 200, 1000, 10).seconds(gpu), Reading(1, 200, 1000, 10).bound(gpu)) == (2.0, "memory")
    assert Reading(1, 200, 3000, 10).bound(gpu) == "products"
    assert Reading(1, 200, 3000, 40).bound(gpu) == "unpacking"


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_a_step_is_faster_from_the_length_that_is_said(gpu):
    shape = LLAMAS["8B"]
    slow, fast = plain_reading(shape), plain_reading(shape, 4, 1)
    tokens = round(tokens_for_speedup(shape, gpu, slow, fast, 1.2))
    ratio = step_seconds(shape, gpu, slow, 1, tokens) / step_seconds(shape, gpu, fast, 1, tokens)
    assert ratio == pytest.approx(1.2, rel=1e-3)
    assert tokens_for_speedup(shape, gpu, fast, slow, 1.2) == float("inf")
    assert tokens_that_fit(shape, gpu, fast) == pytest.approx(3.2 * tokens_that_fit(shape, gpu, slow))


def test_the_tables_of_the_document_are_those_of_the_functions():
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "scripts/roofline.py", "--check"], cwd=root, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr + run.stdout
