"""A GGUF file becomes the model that it was made from, or is refused by the name of a key or tensor."""

import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import pre_tokenizers

from mea.models.loading import load, load_config, load_tokenizer
from tiny_models import stock

VOCABULARY = 257
TENSORS = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
GEMMA = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ROPE: dict[str, dict[str, Any]] = {  # in the configuration
    "default": {"rope_type": "default", "rope_theta": 5e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


def small(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return stock(kind, **{"vocab_size": VOCABULARY, "tie_word_embeddings": False, **changes})


def write(path: Path, model: Any, architecture: str, metadata: dict[str, Any] | None = None, without: str = "") -> str:
    """The file that llama.cpp's converter writes; `metadata` is added, the key `without` left out."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    numbers = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
    }  # fmt: skip
    for key, value in numbers.items():
        if key != without:
            writer.add_uint32(f"{architecture}.{key}", (metadata or {}).pop(key, value))
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}
        add[type(value)](f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*sorted(pre_tokenizers.ByteLevel.alphabet()), "th"])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(0)
    for name, tensor in model.state_dict().items():
        for own, values in renamed(name, tensor, config, architecture):
            writer.add_tensor(own, values.contiguous().numpy())
    parameters = config.rope_parameters
    if parameters.get("rope_type") == "llama3":
        plain = parameters["rope_theta"] ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def renamed(name: str, tensor: torch.Tensor, config: Any, architecture: str) -> list[tuple[str, torch.Tensor]]:
    stem, _, end = name.rpartition(".")
    if stem in TOP:
        return [(f"{TOP[stem]}.{end}", tensor + ("gemma" in architecture and stem == "model.norm"))]
    _, _, layer, rest = stem.split(".", 3)
    if ".experts" in name:
        stacked = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}[end]
        parts = zip(stacked, tensor.chunk(len(stacked), 1), strict=True)
        return [(f"blk.{layer}.{own}.weight", part) for own, part in parts]
    if architecture == "llama" and rest in ("self_attn.q_proj", "self_attn.k_proj"):  # pairs of channels side by side
        tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
    if architecture == "gemma3" and "norm" in rest:
        tensor = tensor + 1
    return [(f"blk.{layer}.{ {**TENSORS, **(GEMMA if architecture == 'gemma3' else {})}[rest] }.{end}", tensor)]


def same(model: Any, path: str) -> None:
    read, _ = load(path)
    ids = torch.randint(1, VOCABULARY, (1, 100))
    with torch.no_grad():
        expected, got = model(ids).logits, read(ids).logits
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("rope", "metadata"),
    [
        ("default", {"rope.freq_base": 5e4, "rope.scaling.type": "none"}),
        ("linear", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        ("linear", {"rope.scaling.factor": 4.0}),  # as llama.cpp, which takes linear for the default
        ("linear", {"rope.scale_linear": 4.0}),
        ("yarn", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}),
        ("llama3", {"rope.freq_base": 5e5}),
    ],
)
def test_rope_scaling_is_that_of_the_model(rope: str, metadata: dict[str, Any], tmp_path: Path) -> None:
    model = small("llama", rope_parameters=ROPE[rope])
    path = write(tmp_path / "m.gguf", model, "llama", metadata)
    assert load_config(path).rope_parameters["rope_type"] == rope
    same(model, path)


@pytest.mark.parametrize(
    ("kind", "architecture", "metadata", "changes"),
    [
        ("qwen2", "qwen2", {}, {}),
        ("qwen3", "qwen3", {"rope.freq_base": 1e6}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("qwen3_moe", "qwen3moe", {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32},
         {"norm_topk_prob": True, "rope_parameters": ROPE["default"] | {"rope_theta": 1e4}}),
        ("gemma3_text", "gemma3", {"attention.sliding_window": 8, "rope.freq_base": 1e6, "rope.scaling.factor": 8.0},
         {"num_hidden_layers": 6, "layer_types": None, "query_pre_attn_scalar": 8, "tie_word_embeddings": True,
          "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                              "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}}),
    ],
)  # fmt: skip
def test_every_architecture_is_the_model_that_the_file_was_made_from(
    kind: str, architecture: str, metadata: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    model = small(kind, **changes)
    same(model, write(tmp_path / "m.gguf", model, architecture, metadata))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, r"llama\.rope\.scaling\.type = 'longrope'"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "original_context_length None"),
        ({"rope.scaling.attn_factor": 2.0}, r"llama\.rope\.scaling\.attn_factor"),
        ({"rope.scaling.factor": float("nan")}, r"has llama\.rope\.scaling\.factor = nan, which is impossible"),
        ({"attention.scale": 2.0}, r"has the key llama\.attention\.scale, which cannot be read"),
        ({"attention.key_length": 16}, r"llama\.attention\.value_length = 8 where heads are 16 wide"),
        ({"rope.dimension_count": 4}, r"llama\.rope\.dimension_count = 4 where heads are 8 wide"),
        ({"block_count": 0}, r"llama\.block_count is a whole number from 1 to 10,000, not 0"),
        ({"block_count": 2**31}, r"llama\.block_count is a whole number"),
        ({"block_count": 2}, r"has the tensor blk\.2\.attn_q\.weight, which a llama has not"),
        ({"attention.head_count": 0}, r"llama\.attention\.head_count is a whole number"),
        ({"attention.head_count": 4}, r"attention\.head_count = 4 is no multiple of .*head_count_kv = 3"),
    ],
)
def test_what_cannot_be_reproduced_is_refused_by_name(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", small("llama"), "llama", metadata)
    with pytest.raises(ValueError, match=message):
        load_config(path)


def test_rope_factors_that_are_not_those_of_llama_3_are_refused(tmp_path: Path) -> None:
    changed = ROPE["llama3"] | {"high_freq_factor": 3.0, "rope_theta": 20.0}
    path = write(tmp_path / "m.gguf", small("llama", rope_parameters=changed), "llama", {"rope.freq_base": 20.0})
    with pytest.raises(ValueError, match=r"has the tensor rope_freqs\.weight with RoPE factors that are not"):
        load_config(path)


def test_missing_and_unknown_parts_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", small("llama"), "llama", without="attention.head_count_kv")
    with pytest.raises(ValueError, match=r"lacks the key llama\.attention\.head_count_kv"):
        load_config(path)
    biased = write(tmp_path / "bias.gguf", small("qwen2"), "llama")
    with pytest.raises(ValueError, match=r"has the tensor blk\.0\.attn_q\.bias, which a llama has not"):
        load_config(biased)
    other = write(tmp_path / "other.gguf", small("llama"), "phi3")
    with pytest.raises(ValueError, match="architecture 'phi3', and GGUF files are read of llama, qwen2, qwen3"):
        load_config(other)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<4sIQQ", b"GGUF", 3, 2**62, 0),
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**62),
        struct.pack("<4sIQQ", b"GGUF", 99, 0, 0),
        struct.pack("<4sIQQQ3sIIQ", b"GGUF", 3, 0, 1, 3, b"key", 9, 4, 2**61),  # an array longer than the file
        struct.pack("<4sIQQQ3sII", b"GGUF", 3, 0, 1, 3, b"key", 9, 9) * 2,  # an array of arrays
        struct.pack("<4sIQQQ3sI", b"GGUF", 3, 0, 1, 2**63, b"key", 4),
        struct.pack("<4sIQQQ3sI", b"GGUF", 3, 0, 1, 3, b"\xff\xfe\xfd", 4),
    ],
)
def test_absurd_counts_and_lengths(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    for read in (load_config, load_tokenizer):
        with pytest.raises(ValueError, match=r"m\.gguf is damaged or incomplete .*; copy or download it again"):
            read(str(tmp_path / "m.gguf"))
