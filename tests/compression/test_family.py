"""This package's own decoder is compressed like any other: its mixing folds away, its head norm stays."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import mea
from compression.small import planned
from mea.comparison.configs import MethodConfig
from mea.comparison.run import Protocol, compare
from mea.compression import Calibration, ConversionError
from mea.compression.api import run_plans
from mea.compression.calibrate.layerwise import LayerWalk, run_layer
from mea.compression.calibrate.statistics import AveragedValuesSum
from mea.compression.calibrate.text import calibration_tokens
from mea.compression.convert import TOLERANCE, checked_stock_form, sharing_copy
from mea.compression.save import compress_to_folder
from mea.evaluate.speed import cache_size
from mea.models.config import MeaConfig
from mea.models.decoder import MeaForCausalLM
from mea.models.fold import stock_config, stock_form

SHAPE: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 512, "head_norm_eps": 1e-4,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "mea": {"attention": "mea", "tie_word_embeddings": True},
    "mea-no_gain": {"attention": "mea", "attention_options": {"head_norm": "no_gain", "mix": "keys"}},
    "mea-per_head_gain-qk_norm-window": {
        "attention": "mea",
        "attention_options": {"head_norm": "per_head_gain", "qk_norm": True},
        "sliding_window": 24,
        "attention_bias": True,
        "rms_norm_eps": 1e-6,
    },
    "mea-frequency-linear": {
        "attention": "mea",
        "attention_options": {"key_mixing": "frequency"},
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
    },
    "modified_talking_heads-bias": {"attention": "modified_talking_heads", "attention_bias": True},
    "mea-fewer_components": {"attention": "mea", "attention_options": {"num_component_heads": 2}},
    "mea-shared_components": {"attention": "mea", "attention_options": {"share_components": True}},
    "gqa-window": {"attention": "gqa", "sliding_window": 24},
    "gqa-norm": {"attention": "gqa", "attention_options": {"head_norm": "shared_gain"}},
    "knocking_heads-qk_norm": {"attention": "knocking_heads", "attention_options": {"qk_norm": True}},
}


def build(kind: str, dtype: torch.dtype = torch.float32) -> MeaForCausalLM:
    """Weights of about the size that training gives, with no gain, bias or mixing at its initial value."""
    torch.manual_seed(0)
    model = MeaForCausalLM(MeaConfig(**SHAPE, **KINDS[kind])).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or "mixing" in name or "head_norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
        else:
            parameter.data = torch.randn_like(parameter) * (1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
    model.tie_weights()
    return model.to(dtype)  # pyright: ignore


def logits(model: Any, length: int = 40) -> torch.Tensor:
    with torch.no_grad():
        return model((torch.arange(length) * 31 % SHAPE["vocab_size"])[None]).logits


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp_min(1.0)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


# Of fewer components `keep` is not all that a joint latent could hold: what is left is exact only up to the moments.
# Likewise of shared components, which separate latents of as many bytes cannot hold at all.
@pytest.mark.parametrize(
    ("kind", "method"),
    [(kind, method) for kind in KINDS for method in ("post_rope:uniform", "svd") if "shared" not in kind]
    + [(kind, "shared") for kind in KINDS if "fewer" not in kind and "shared" not in kind],
)
def test_at_full_rank_nothing_changes(kind: str, method: str, tokenizer: Any, calibration: Calibration) -> None:
    model = build(kind)
    result = mea.compress(model, tokenizer, keep=1.0, method=method, calibration=calibration)
    assert_same(logits(result), logits(model))
    # Decoding over the compressed cache, against the pass at once through the uncompressed model.
    ids = (torch.arange(40) * 31 % 256)[None]
    cache, steps = None, []
    with torch.no_grad():
        for token in ids.split(1, dim=1):
            out = result(token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert_same(torch.cat(steps, 1), logits(model))


def test_half_of_the_cache_stays_and_saving_changes_nothing(
    kind: str, tokenizer: Any, calibration: Calibration, tmp_path: Path
) -> None:
    model = build(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = mea.compress(model, tokenizer, keep=0.5, method="post_rope", calibration=calibration)
    assert cache_size(result, 20).bytes * 2 == cache_size(model, 20).bytes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    result.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(result)
    assert torch.equal(logits(again), logits(result))


def test_layers_left_alone_keep_their_norm(tokenizer: Any, calibration: Calibration, tmp_path: Path) -> None:
    model = build("mea")
    ranks = tmp_path / "ranks.json"
    ranks.write_text("[[16, 16], null, [32, 32]]")
    result = mea.compress(model, tokenizer, layout=ranks, method="post_rope", calibration=calibration)
    result.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert [type(layer.self_attn).__name__ for layer in again.model.layers][1] == "LlamaAttention"
    assert torch.equal(logits(again), logits(result))
    kept = again.model.layers[1].self_attn.o_proj
    assert kept.eps == SHAPE["head_norm_eps"]
    x = torch.randn(1, 3, 64)
    change = (kept(3 * x) - kept(x)).abs().max()
    assert change < 1e-2 * kept(x).abs().max(), "a norm takes out the scale, but for eps"


def test_a_saved_decoder_is_compressed_to_a_folder_that_loads_without_this_package(
    tokenizer: Any, calibration: Calibration, tmp_path: Path
) -> None:
    model, folder, out = build("mea"), tmp_path / "model", tmp_path / "out"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = compress_to_folder(str(folder), out, method="post_rope", calibration=calibration, measure_tokens=0)
    assert record["results"]["cache_bytes_per_token"] * 2 == record["results"]["cache_bytes_per_token_before"]
    script = (
        "import sys; sys.modules['mea'] = None\n"
        "import torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "with torch.no_grad(): torch.save(model((torch.arange(40) * 31 % 256)[None]).logits, sys.argv[2])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(out), str(tmp_path / "logits.pt")],
        env={"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    here = AutoModelForCausalLM.from_pretrained(out).eval()
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(here))


def test_in_bf16_the_stock_form_errs_no_more_than_twice_as_much(kind: str) -> None:
    """Rotary frequencies included, which moving a finished model to bf16 would round: by 0.4 % of a turn per turn."""
    model = build(kind, torch.bfloat16)
    exact = logits(build(kind, torch.bfloat16).float())
    stock = stock_form(model)
    assert {parameter.dtype for parameter in stock.parameters()} == {torch.bfloat16}
    assert stock.model.rotary_emb.inv_freq.dtype == torch.float32
    errors = [(logits(each).float() - exact).square().mean().sqrt() for each in (stock, model)]
    assert errors[0] <= 2 * errors[1]


def test_moments_are_those_of_normed_heads(tokenizer: Any, calibration: Calibration) -> None:
    """With uncompressed keys the moments' target is the layer's true output; full-rank factors miss nothing of it."""
    model = stock_form(build("mea"))
    attention, tokens = model.model.layers[0].self_attn, calibration_tokens(tokenizer, calibration)
    inputs = LayerWalk(model).inputs(tokens.shape[1])[0]
    total = AveragedValuesSum(attention, inputs, torch.eye(32))
    energy = 0.0
    with torch.no_grad():
        for window in run_layer(model.model.layers[0], model.model.embed_tokens(tokens), inputs):
            total.add(window.attention_in, window.heads_out, window.weight)
            outputs = attention.o_proj(window.heads_out)[1::2]
            energy += (outputs.square().sum(-1) * window.weight[1::2]).sum().item()
        assert total.energy == pytest.approx(energy, rel=1e-5)
        moments = total.result()
        # y = sum_i W_i u_i[g(i)]: the moments of the averages must give the energy of the output, which is 1.
        own = torch.zeros(8, 32, 8)
        for head in range(8):
            own[head, head // 2 * 8 : head // 2 * 8 + 8] = torch.eye(8)
        read = torch.einsum("ina,ioa->ino", own, moments.output_weight[0])
        found = torch.einsum("ino,injm,jmo->", read, moments.gram[0], read)
    assert found.item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("method", ["post_rope:uniform", "post_rope:frequency", "svd"])
def test_as_many_numbers_as_components_hold_all_of_them(method: str, tokenizer: Any, calibration: Calibration) -> None:
    """`keep` counts from what the model caches, and its components are found again: nothing is lost of them."""
    model = build("mea-fewer_components")
    plan = planned(model.config, keep=1.0, method=method, calibration=calibration)
    assert plan.layout.ranks == ((16, 16),) * 3
    assert plan.bytes_before(100) == cache_size(model, 100).bytes
    result = mea.compress(model, tokenizer, keep=1.0, method=method, calibration=calibration)
    assert cache_size(result, 100).bytes == cache_size(model, 100).bytes
    assert_same(logits(result), logits(model))


def test_fewer_components_of_values_alone_go_with_a_norm_of_keys(calibration: Calibration) -> None:
    """That norm is why components of keys cannot be folded; here keys have none."""
    torch.manual_seed(0)
    options = {"num_component_heads": 1, "mix": "values", "qk_norm": True}
    model = MeaForCausalLM(MeaConfig(**SHAPE, attention="mea", attention_options=options)).eval()
    assert_same(logits(stock_form(model)), logits(model))
    plan = planned(model.config, keep=0.8, calibration=calibration)
    assert plan.bytes_before(100) == cache_size(model, 100).bytes
    packed = planned(model.config, keep=0.8, method="predictive", calibration=calibration)
    assert 2 * packed.bytes_before(100) == cache_size(model, 100).bytes  # the model is fp32, its budget's unit 16 bits


def test_fewer_components_do_not_grow(tokenizer: Any, calibration: Calibration, tmp_path: Path) -> None:
    (tmp_path / "ranks.json").write_text("[[16, 16], null, [8, 8]]")
    with pytest.raises(
        ValueError, match=r"would cache .* bytes per token, and the model with its fewer component heads"
    ):
        mea.compress(
            build("mea-fewer_components"), tokenizer, method="post_rope", layout=tmp_path / "ranks.json",
            calibration=calibration,
        )  # fmt: skip


def test_losses_grow_as_less_is_kept(tokenizer: Any, calibration: Calibration) -> None:
    tokens = calibration_tokens(tokenizer, calibration)
    model = checked_stock_form(build("mea"), tokens)
    plans = [planned(model.config, keep=keep, calibration=calibration) for keep in (0.75, 0.5, 0.25)]
    lost = torch.tensor([result.layers for result in run_plans(LayerWalk(model), tokens, plans)])
    assert (lost > 0).all()
    assert (lost[:-1] < lost[1:]).all()


def test_a_model_of_transformers_is_its_own_stock_form(tokenizer: Any, calibration: Calibration) -> None:
    stock = stock_form(build("gqa-norm"))
    assert stock_form(stock) is stock
    assert stock_config(stock.config) is stock.config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": "differential_v1"}, "'differential_v1' attention cannot be compressed.*supported are"),
        ({"attention": "differential_v2"}, "'differential_v2' attention cannot be compressed"),
        ({"attention": "talking_heads"}, "'talking_heads' attention cannot be compressed"),
        (
            {"attention_options": {"num_component_heads": 2, "qk_norm": True}},
            "caches 2 component heads.*without qk_norm",
        ),
        ({"rope_parameters": {"rope_type": "none"}}, "partial or no rotary embedding"),
        ({"sliding_window": 8, "attention_bias": True}, "a sliding window and attention_bias"),
    ],
)
def test_what_cannot_be_compressed_is_refused_before_its_weights_are_read(
    fields: dict, message: str, tokenizer: Any, calibration: Calibration, tmp_path: Path
) -> None:
    model = MeaForCausalLM(MeaConfig(**SHAPE, **fields))
    with pytest.raises(ValueError, match=message):
        mea.compress(model, tokenizer, calibration=calibration)
    model.save_pretrained(tmp_path / "model")  # without a tokenizer, which is asked for next
    with pytest.raises(ValueError, match=message):
        compress_to_folder(str(tmp_path / "model"), tmp_path / "out", calibration=calibration)


def test_a_wrong_fold_is_refused(tokenizer: Any, calibration: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    from mea.attention import MultiheadExplicitAttention

    right = MultiheadExplicitAttention.folded

    def wrong(self: Any, **options: Any) -> Any:
        plain = sharing_copy(right(self, **options))
        plain.k_proj.weight.data = 1.01 * plain.k_proj.weight.data
        return plain

    monkeypatch.setattr(MultiheadExplicitAttention, "folded", wrong)
    with pytest.raises(ConversionError, match="with its mixing folded the model's logits differ"):
        mea.compress(build("mea"), tokenizer, method="post_rope", calibration=calibration)


@pytest.mark.parametrize("kind", ["mea-no_gain", "mea-fewer_components"])
def test_comparisons_count_from_the_model_as_it_was_given(
    kind: str, tokenizer: Any, calibration: Calibration, tmp_path: Path
) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    protocol = Protocol(
        texts=(("technical", 256),), window=128, position_text="technical", positions=(0, 128, 256),
        prompt="The", new_tokens=2, decode_context=64, decode_steps=2,
    )  # fmt: skip
    records = compare(
        str(tmp_path / "model"),
        tmp_path / "out",
        [MethodConfig("svd", "svd")],
        protocol=protocol,
        calibration=calibration,
    )
    sizes = [record["results"]["cache"]["bytes_per_token"] for record in records]
    assert sizes == [cache_size(model, 64).bytes_per_token, cache_size(model, 64).bytes_per_token / 2]
