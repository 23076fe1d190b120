"""Damaged copies of valid files, and what has to become of each: success, or an error that the user can put right."""

import copy
import json
import os
import random
import re
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import settings

from compression.small import tiny
from mea.compression.budget import CacheShape, Step, read_layout
from mea.models.gate import INDEX
from mea.models.loading import load_config
from mea.report import find_records, make_sections
from mea.report.schema import SCHEMAS

CLEAN = (ValueError, OSError)  # what the command line prints as one line
SHAPE = CacheShape(4, 8, (None,) * 3, 4)
NASTY: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "0", "../x.safetensors", "a\0b.safetensors", "\ud800", "\x1b[2J", "x" * 5000),
    *([], {}, [[]], [None], [{}], {"": None}, {"a": {"b": {"c": []}}}, ["llama"], {"type": ["linear"]}),
]
WORDS = [0, 1, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**62, 2**63, 2**64 - 1]  # lengths and counts in headers
DEEP = "[" * 100_000


def mutated_json(value: Any, random: random.Random, times: int = 2) -> Any:
    """The value with up to `times` members replaced, removed, doubled or swapped."""
    value = copy.deepcopy(value)
    for _ in range(random.randint(1, times)):
        places: list[tuple[Any, Any]] = []
        stack = [value]
        while stack:
            part = stack.pop()
            keys = part if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ()
            places += [(part, key) for key in keys]
            stack += [part[key] for key in keys]
        if not places:
            return random.choice(NASTY)
        parent, key = random.choice(places)
        match random.randrange(6):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[random.choice(["", "\ud800", "x", str(key) + "x"])] = parent.pop(key)
            case 2:
                other, index = random.choice(places)
                parent[key] = copy.deepcopy(other[index]) if index in other or isinstance(other, list) else None
            case _:
                parent[key] = copy.deepcopy(random.choice(NASTY))
    return value


def mutated_bytes(content: bytes, random: random.Random) -> bytes:
    """The bytes cut, flipped, repeated, or with a number of eight bytes in them."""
    at = random.randrange(len(content) + 1)
    size = random.choice([1, 2, 8, 64])
    match random.randrange(5):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + bytes(random.randrange(256) for _ in range(size)) + content[at + size :]
        case 2:
            return content[:at] + content[at + size :]
        case 3:
            return content[:at] + content[at : at + size] * 2 + content[at + size :]
    return content[:at] + struct.pack("<Q", random.choice(WORDS)) + content[at + 8 :]


def mutated_text(value: Any, random: random.Random) -> bytes:
    """A JSON file: of a mutated value mostly, damaged otherwise."""
    match random.randrange(10):
        case 0:
            return mutated_bytes(json.dumps(value).encode(), random)
        case 1:
            return random.choice(
                [b"", b"\xff\xfe", DEEP.encode(), ('{"a":' * 990 + "1" + "}" * 990).encode(), b"1e999"]
            )
    return json.dumps(mutated_json(value, random)).encode()


# GGUF: metadata as (type, value), where an array's value is (type, values); tensors as (shape, type, offset).
GGUF_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_DATA = 1184
GgufPart = tuple[dict[str, tuple[int, Any]], dict[str, tuple[tuple[int, ...], int, int]]]


def gguf_bytes(parts: GgufPart) -> bytes:
    """A GGUF file of these parts, with zeros for the tensors."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def write(kind: int, value: Any) -> bytes:
        if kind == 9:
            return struct.pack("<IQ", value[0], len(value[1])) + b"".join(write(value[0], item) for item in value[1])
        return text(value) if kind == 8 else struct.pack(f"<{GGUF_FORMS[kind]}", value)

    metadata, tensors = parts
    content = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    for key, (kind, value) in metadata.items():
        content += text(key) + struct.pack("<I", kind) + write(kind, value)
    for name, (shape, kind, offset) in tensors.items():
        content += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return content + bytes(-len(content) % 32) + bytes(GGUF_DATA)


def gguf_parts() -> GgufPart:
    """A valid header of a Llama, with RoPE factors of Llama 3 that say nothing."""
    numbers = {
        "block_count": 1, "context_length": 64, "embedding_length": 16, "feed_forward_length": 16,
        "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 8, "rope.dimension_count": 8,
    }  # fmt: skip
    metadata: dict[str, tuple[int, Any]] = {"general.architecture": (8, "llama"), "general.alignment": (4, 32)}
    metadata |= {f"llama.{key}": (4, value) for key, value in numbers.items()}
    floats = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e4, "rope.scaling.factor": 4.0}
    metadata |= {f"llama.{key}": (6, value) for key, value in floats.items()}
    metadata |= {"llama.rope.scaling.type": (8, "linear"), "llama.rope.scaling.original_context_length": (4, 32)}
    metadata |= {"tokenizer.ggml.model": (8, "gpt2"), "tokenizer.ggml.tokens": (9, (8, ["a", "b"]))}
    return metadata, {"token_embd.weight": ((16, 2), 0, 32), "blk.0.attn_q.weight": ((16, 16), 0, 160)}


def mutated_gguf(random: random.Random) -> bytes:
    """A GGUF file with keys of other types or values, or with damaged bytes."""
    metadata, tensors = gguf_parts()
    if random.random() < 0.3:
        del metadata["llama.rope.scaling.factor"]
        tensors["rope_freqs.weight"] = ((4,), 0, 0)
    content = gguf_bytes((metadata, tensors))
    if random.random() < 0.3:
        return mutated_bytes(content, random)
    for _ in range(random.randint(1, 2)):
        key = random.choice(list(metadata))
        kind = random.choice([0, 4, 5, 6, 7, 8, 9, 10, 11, 12])
        if kind == 8:
            value: Any = random.choice(["", "x", "yarn", "longrope", "none", "7"])
        elif kind == 9:
            value = (4, [1, 2])
        elif kind in (6, 12):
            value = random.choice([0.0, -1.0, 1e-30, 3e38, float("nan"), float("inf"), 8.0])
        else:
            value = random.choice([0, 1, 7, 64, 127]) if kind != 7 else True
        metadata[key] = (kind, value)
    if "rope_freqs.weight" in tensors:
        values = [random.choice([0.0, 1.0, -2.0, 8.0, 1e-5, 3e38, float("nan"), float("inf")]) for _ in range(4)]
        return gguf_bytes((metadata, tensors))[:-GGUF_DATA] + struct.pack("<4f", *values) + bytes(GGUF_DATA - 16)
    return gguf_bytes((metadata, tensors))


def header_bytes(header: Any, data: int) -> bytes:
    """A safetensors file with this header and so many bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


@cache
def small_records() -> list[Any]:
    """The smallest record of each kind that this repository has, with lists of samples of at most eight members."""

    def shortened(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shortened(part) for key, part in value.items()}
        return [shortened(part) for part in value[:8]] if isinstance(value, list) else value

    found: dict[str, Path] = {}
    for path in sorted(Path(__file__).parents[2].glob("experiments/*/**/*.json"), key=lambda path: path.stat().st_size):
        kind = re.search(r'"kind": "([^"]+)"', path.read_text(encoding="utf-8"))
        if kind and kind[1] in SCHEMAS:
            found.setdefault(kind[1], path)
    records = [json.loads(path.read_text(encoding="utf-8")) for path in found.values()]
    return [record | {"samples": shortened(record["samples"])} for record in records]


def examples(count: int) -> settings:
    """So many examples in `make test`, more in `make fuzz`."""
    return settings(max_examples=count * (4 if "FUZZ_SECONDS" in os.environ else 1))


class Ground:
    """A valid model folder and a record, and functions that read a damaged file in the place of one of theirs."""

    def __init__(self, folder: Path):
        self.folder = folder
        tiny().save_pretrained(folder / "model", max_shard_size="50kB")
        self.model = folder / "model"
        self.shard = sorted(self.model.glob("*.safetensors"))[0]
        content = self.shard.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        self.header, self.data = json.loads(content[8 : 8 + length]), len(content) - 8 - length
        self.config = json.loads((self.model / "config.json").read_text())
        self.index = json.loads((self.model / INDEX).read_text())

    def read(self, kind: str, content: bytes) -> None:
        """Read a file of this kind.

        Raises
        ------
        ValueError, OSError
            It is refused.
        """
        readers: dict[str, Callable[[bytes], Any]] = {
            "config": lambda content: self._in_place(self.model / "config.json", content),
            "index": lambda content: self._in_place(self.model / INDEX, content),
            "header": lambda content: self._in_place(self.shard, header_bytes(content, self.data)),
            "shard": lambda content: self._in_place(self.shard, content),
            "gguf": lambda content: load_config(str(self._written("m.gguf", content))),
            "layout": lambda content: read_layout(self._written("layout.json", content), SHAPE, Step(8)),
            "record": lambda content: make_sections(find_records([self._written("record.json", content)])),
        }
        readers[kind](content)

    def accepts(self, kind: str, content: bytes) -> bool:
        """Whether the file is read; otherwise it is refused as it should be."""
        try:
            self.read(kind, content)
        except CLEAN:
            return False
        return True

    def _written(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def _in_place(self, path: Path, content: bytes) -> None:
        before = path.read_bytes()
        path.write_bytes(content)
        try:
            load_config(str(self.model))
        finally:
            path.write_bytes(before)
