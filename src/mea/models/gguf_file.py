"""The header of a GGUF file: what the model is, or a refusal that names the key or tensor.

transformers leaves out keys and tensors that it does not know, such as RoPE scaling, and loads another model without a
word. Here every key of the architecture and every tensor is known, or the file is refused.
"""

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mea.names import listed

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY, FLOAT32 = 8, 9, 0
NUMBERS = {  # key -> its name in a configuration; all are needed
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
FLOATS = {
    *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.freq_base_swa", "rope.scale_linear"),
    *("rope.scaling.factor", "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
}
POSITIVE = {"attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.freq_base_swa"}
NO_NUMBERS = {"rope.scaling.type": str, "rope.scaling.finetuned": bool}
KEYS = {
    *NUMBERS,
    *(FLOATS - {"rope.freq_base_swa"}),
    *NO_NUMBERS,
    *("attention.key_length", "attention.value_length", "vocab_size"),
    *("rope.dimension_count", "rope.scaling.original_context_length"),
}
BLOCK = {f"{part}.weight" for part in (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"
)}  # fmt: skip
TENSORS = {"token_embd.weight", "output_norm.weight", "output.weight", "rope_freqs.weight"}
HEAD_NORMS = {"attn_q_norm.weight", "attn_k_norm.weight"}
EXPERTS = {"ffn_gate_inp.weight", *(f"ffn_{part}_exps.weight" for part in ("gate", "up", "down"))}
# Architecture -> further keys, and further tensors of a layer.
ARCHITECTURES: dict[str, tuple[set[str], set[str]]] = {
    "llama": (set(), set()),
    "qwen2": (set(), {"attn_q.bias", "attn_k.bias", "attn_v.bias"}),
    "qwen3": (set(), HEAD_NORMS),
    "qwen3moe": ({"expert_count", "expert_used_count", "expert_feed_forward_length"}, HEAD_NORMS | EXPERTS),
    "gemma3": (
        {"attention.sliding_window", "rope.freq_base_swa"},
        {*HEAD_NORMS, "post_attention_norm.weight", "post_ffw_norm.weight"},
    ),
}
GEMMA_27B = 62  # layers of the only Gemma 3 that does not divide scores by the root of a head's width
LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0  # of every released model
NEAR = 1e-4  # relative difference of two RoPE factors that are the same number, written in fp32


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensors of a GGUF file.

    Attributes
    ----------
    metadata
        Key -> value; an array is the range of its indices, its members are not read.
    tensors
        Name -> shape, type and place in the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], int, int]]

    @property
    def architecture(self) -> Any:
        """As the file names it."""
        return self.metadata.get("general.architecture")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key of the architecture."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def read_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises
    ------
    ValueError
        The file is damaged, its architecture is not supported, or a key that every model needs is missing.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            header = _Cursor(content).header(path)
    except (struct.error, ValueError, KeyError, OverflowError) as error:
        raise ValueError(
            f"{path} is damaged or incomplete (its header cannot be read: {error}); copy or download it again"
        ) from None
    if header.architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path} has the architecture {header.architecture!r}, and GGUF files are read of {listed(ARCHITECTURES)}: "
            "give the model as a folder of safetensors"
        )
    for key in (*NUMBERS, "attention.layer_norm_rms_epsilon"):
        if header.get(key) is None:
            raise ValueError(f"{path} lacks the key {header.architecture}.{key}: convert the model again")
    return header


def config_fields(header: GgufHeader) -> dict[str, Any]:
    """Fields of the model's configuration that transformers does not take from a GGUF file, or not always.

    Raises
    ------
    ValueError
        A key or tensor is missing, unknown or unusual, or the file has RoPE scaling that cannot be reproduced.
    """
    _check_known(header)
    rope = _rope_parameters(header)
    fields: dict[str, Any] = {"head_dim": _head_dim(header), "rope_parameters": rope}
    if header.architecture == "gemma3":
        near = {"rope_type": "default", "rope_theta": header.get("rope.freq_base_swa", 10000.0)}
        fields["rope_parameters"] = {"sliding_attention": near, "full_attention": rope}
        width = header.get("embedding_length") // header.get("attention.head_count")
        fields["query_pre_attn_scalar"] = width if header.get("block_count") == GEMMA_27B else _head_dim(header)
    if header.architecture == "qwen3moe":
        fields["moe_intermediate_size"] = header.get("expert_feed_forward_length")
    return fields


def _check_known(header: GgufHeader) -> None:
    path, name = header.path, header.architecture
    keys, of_block = ARCHITECTURES[name]
    for key in header.metadata:
        own = key.removeprefix(f"{name}.")
        if own != key and own not in KEYS | keys:
            raise ValueError(f"{path} has the key {key}, which cannot be read: give the model as a folder")
        if own != key:
            _check_type(path, own, header.metadata[key], key)
    for tensor in header.tensors:
        block = re.fullmatch(r"blk\.(\d+)\.(.+)", tensor)
        if not (int(block[1]) < header.get("block_count") and block[2] in BLOCK | of_block if block
                else tensor in TENSORS):  # fmt: skip
            raise ValueError(f"{path} has the tensor {tensor}, which a {name} has not: give the model as a folder")
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if header.get(key, _head_dim(header)) != _head_dim(header):
            raise ValueError(
                f"{path} has {name}.{key} = {header.get(key)} where heads are {_head_dim(header)} wide: give the model "
                "as a folder"
            )


def _check_type(path: Path, own: str, value: Any, key: str) -> None:
    """A number that is finite and not negative, whole unless it is one of `FLOATS`; or as `NO_NUMBERS` says."""
    if own in NO_NUMBERS:
        good = isinstance(value, NO_NUMBERS[own])
    else:
        number = isinstance(value, int | float if own in FLOATS else int) and not isinstance(value, bool)
        good = number and 0 <= value < math.inf
    if not good or (own in POSITIVE and not value):
        raise ValueError(f"{path} has {key} = {value!r}, which is impossible: copy or download it again")


def _head_dim(header: GgufHeader) -> int:
    given = header.get("attention.key_length")
    return given if given else header.get("embedding_length") // max(1, header.get("attention.head_count"))


def _rope_parameters(header: GgufHeader) -> dict[str, Any]:
    """RoPE as llama.cpp reads it: a factor without a type is linear scaling."""
    path, name = header.path, header.architecture
    plain = {"rope_type": "default", "rope_theta": header.get("rope.freq_base", 10000.0)}
    factor = header.get("rope.scaling.factor", header.get("rope.scale_linear", 0.0)) or 1.0
    kind = header.get("rope.scaling.type", "linear")
    if header.get("rope.scaling.attn_factor", 1.0) != 1:
        raise ValueError(
            f"{path} has {name}.rope.scaling.attn_factor, which cannot be read: give the model as a folder"
        )
    scaled = kind != "none" and factor != 1
    if "rope_freqs.weight" in header.tensors:
        return plain | _llama3(header, plain["rope_theta"], scaled)
    if not scaled:
        return plain
    if kind == "linear":
        return plain | {"rope_type": "linear", "factor": factor}
    original = header.get("rope.scaling.original_context_length")
    if kind == "yarn" and original:
        betas = {f"beta_{end}": header.get(f"rope.scaling.yarn_beta_{end}") for end in ("fast", "slow")}
        given = {beta: value for beta, value in betas.items() if value is not None}
        return plain | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original} | given
    raise ValueError(
        f"{path} has {name}.rope.scaling.type = {kind!r}, factor {factor:g} and original_context_length {original}: "
        "linear scaling can be read, and yarn with its original length; give the model as a folder"
    )


def _llama3(header: GgufHeader, theta: float, scaled: bool) -> dict[str, Any]:
    """The scaling of Llama 3.1 whose factors ``rope_freqs.weight`` holds."""
    (shape, kind, place), width = header.tensors["rope_freqs.weight"], _head_dim(header)
    if not scaled and kind == FLOAT32 and shape == (width // 2,):
        with header.path.open("rb") as file:
            file.seek(place)
            content = file.read(2 * width)
        factors = struct.unpack(f"<{width // 2}f", content) if len(content) == 2 * width else ()
        if factors and all(abs(factor - 1) < NEAR for factor in factors):
            return {}
        if not all(NEAR < factor < math.inf for factor in factors):
            factors = ()
        original = 1
        while factors and original < header.get("context_length"):
            original *= 2
            found = {"factor": float(round(max(factors), 4)), "original_max_position_embeddings": original}
            if all(abs(a / b - 1) < NEAR for a, b in zip(factors, _factors(theta, width, **found), strict=True)):
                ends = {"low_freq_factor": LLAMA3_LOW, "high_freq_factor": LLAMA3_HIGH}
                return {"rope_type": "llama3", **found, **ends}
    raise ValueError(
        f"{header.path} has the tensor rope_freqs.weight with RoPE factors that are not the scaling of Llama 3.1: give "
        "the model as a folder"
    )


def _factors(theta: float, width: int, factor: float, original_max_position_embeddings: int) -> list[float]:
    """What divides each frequency in Llama 3.1 (transformers' ``_compute_llama3_parameters``)."""
    factors = []
    for i in range(width // 2):
        turns = original_max_position_embeddings / (2 * math.pi * theta ** (2 * i / width))
        smooth = min(1.0, max(0.0, (turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


class _Cursor:
    """Reads the parts of a header one after the other; what lies outside of the file is a struct.error."""

    def __init__(self, content: mmap.mmap):
        self.content, self.at = content, 0

    def header(self, path: Path) -> GgufHeader:
        magic, version, tensor_count, key_count = self.numbers("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"version {version} of {magic!r}")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self.text()
            if key in metadata:
                raise ValueError(f"the key {key} twice")
            metadata[key] = self.value(*self.numbers("I"))
        tensors: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensor_count):
            name, (dimensions,) = self.text(), self.numbers("I")
            if dimensions > 4 or name in tensors:
                raise ValueError(f"the tensor {name} with {dimensions} dimensions")
            tensors[name] = self.numbers(f"{dimensions}Q"), *self.numbers("IQ")
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment is a positive number, not {alignment!r}")
        start = -(-self.at // alignment) * alignment
        placed = {name: (shape, kind, start + offset) for name, (shape, kind, offset) in tensors.items()}
        for name, (_, _, place) in placed.items():
            if place > len(self.content):
                raise ValueError(f"the tensor {name} begins behind the end of the file")
        return GgufHeader(path, metadata, placed)

    def numbers(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{form}", self.content, self.at)
        self.at += struct.calcsize(f"<{form}")
        return found

    def text(self) -> str:
        (size,) = self.numbers("Q")
        self.skip(size)
        return self.content[self.at - size : self.at].decode()

    def skip(self, size: int) -> None:
        if size > len(self.content) - self.at:
            raise ValueError("it is longer than the file")
        self.at += size

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.numbers(SCALARS[kind])[0]
        kind, count = self.numbers("IQ")
        if kind == STRING:
            for _ in range(count):
                self.skip(*self.numbers("Q"))
        else:
            self.skip(count * struct.calcsize(SCALARS[kind]))
        return range(count)
