"""Checks of a model folder before it is read; errors say what was given, what was expected and what to do.

transformers trusts the files of a folder: an index may name files elsewhere, a configuration may ask for code or for a
billion layers, integers may stand where weights belong. Nothing here reads weights.
"""

import math
import struct
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mea.models.gguf_file import NUMBERS, GgufHeader, config_fields, read_header
from mea.names import listed
from mea.records import parse_json

INDEX = "model.safetensors.index.json"
AGAIN = "copy or download it again"
LARGEST = {  # far above any released model
    "num_hidden_layers": 10_000,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**31,
}
DERIVED = ("num_key_value_heads", "head_dim")  # None stands for a default
POSITIVE = ("rms_norm_eps", "rope_theta", "initializer_range")
DTYPES = ("float32", "bfloat16", "float16", "float64")
FLOATS = ("F64", "F32", "F16", "BF16")  # in safetensors
WEIGHTS = ("weight", "_proj.bias", "encoder", "decoder", "mean")  # ends of the names of tensors that are no integers
GENERATION = "generation_config.json"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
SEVERAL = ("eos_token_id", "suppress_tokens", "begin_suppress_tokens")  # one token or a list of them
COUNTS = (  # of a generation configuration, whole; a token's number is one too
    *("bos_token_id", "pad_token_id", "forced_bos_token_id", "max_length", "max_new_tokens", "min_length"),
    *("min_new_tokens", "top_k", "num_beams", "num_return_sequences", "no_repeat_ngram_size", "prefill_chunk_size"),
)
SIZES = (
    *("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty"),
    *("length_penalty", "guidance_scale", "max_time"),
)
SHOWN = ("output_hidden_states", "output_attentions", "return_dict")  # what a call gives back
ELSEWHERE = {"transformers_weights": "names another file of weights"}


def check_folder(folder: Path) -> None:
    """Check a folder with a model: configuration, index, headers of the weights, tokenizer settings.

    Raises
    ------
    ValueError
        Something is missing, damaged, absurd, outside of the folder, or would run code.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: it is not a model folder")
    config = read_json(folder / "config.json")
    check_config(config, str(folder / "config.json"))
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter (adapter_config.json): merge it into its model first")
    check_tokenizer(folder)
    if (folder / GENERATION).is_file():
        _check_generation(read_json(folder / GENERATION), str(folder / GENERATION))
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ValueError(f"{folder} holds no .safetensors weights; other formats can run code and are not read")
    for shard in sorted({*_listed_shards(folder), *shards}):
        _check_shard(shard, quantised=config.get("quantization_config") is not None)


def check_gguf(path: Path) -> tuple[GgufHeader, dict[str, Any]]:
    """The header of a GGUF file and the fields that it adds to the configuration.

    Raises
    ------
    ValueError
        As `read_header` and `config_fields`, or a number is absurd.
    """
    header = read_header(path)
    named = {name: header.get(key) for key, name in NUMBERS.items()}
    _check_numbers(named, {name: f"{header.architecture}.{key}" for key, name in NUMBERS.items()}, str(path))
    return header, config_fields(header)


def check_tokenizer(folder: Path) -> None:
    """Check a tokenizer's settings, if there are any.

    Raises
    ------
    ValueError
        They are damaged, or have a wrong type.
    """
    path = folder / "tokenizer_config.json"
    longest = read_json(path).get("model_max_length") if path.is_file() else None
    if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int | float)):
        raise ValueError(f"{path}: model_max_length is a number of tokens, not {longest!r}")


def check_config(config: dict[str, Any], where: str) -> None:
    """Check what a configuration says, before a model or a list of its layers is made.

    Raises
    ------
    ValueError
        A value is absurd or of the wrong type, or the model needs code or files from elsewhere.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str | None):
        raise ValueError(f"{where}: model_type is a name, not {kind!r}")
    if config.get("auto_map") and kind not in CONFIG_MAPPING:
        raise ValueError(
            f"{where}: the model {kind!r} needs code that comes with it (auto_map); such code is never run: give a "
            "model that transformers knows"
        )
    for name, does in ELSEWHERE.items():
        if config.get(name) is not None:
            raise ValueError(f"{where}: {name} {does}, which is not followed: remove it")
    text = config.get("text_config")
    for part in (config, *([text] if isinstance(text, dict) else [])):
        _check_numbers(part, {name: name for name in LARGEST}, where)
        for name in ("dtype", "torch_dtype"):
            given = part.get(name)
            if given not in (None, "auto") and str(given).removeprefix("torch.") not in DTYPES:
                raise ValueError(f"{where}: {name} is {listed(DTYPES)}, not {given!r}")
        for name in POSITIVE:
            if name in part and part[name] is not None:
                _check_positive(part[name], name, where)
        for name in ("rope_parameters", "rope_scaling"):
            _check_rope(part.get(name), name, where)
        _check_generation({name: part.get(name) for name in (*TOKENS, *SHOWN)}, where)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises
    ------
    ValueError
        It is damaged, nested too deep, or holds something else.
    """
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:  # of JSON and of Unicode
        raise ValueError(f"{path} is damaged ({error}); {AGAIN}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged (it holds a {type(value).__name__}, not an object); {AGAIN}")
    return value


def explain(error: Exception) -> str:
    """A library's error about a file in one line, without its advice to trust the file's code."""
    if isinstance(error, RecursionError | MemoryError):
        return "it is nested too deep, or larger than memory"
    text = str(error).strip()
    if "trust_remote_code" in text or "custom code" in text:
        return "it needs code that comes with it; such code is never run: give a model that transformers knows"
    return text.splitlines()[0] if text else type(error).__name__


def _check_numbers(values: dict[str, Any], names: dict[str, str], where: str) -> None:
    for field, name in names.items():
        value = values.get(field, 1)
        if value is None and field in DERIVED:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST[field]:
            raise ValueError(f"{where}: {name} is a whole number from 1 to {LARGEST[field]:,}, not {value!r}")
    heads, shared = (values.get(field) for field in ("num_attention_heads", "num_key_value_heads"))
    if heads and shared and heads % shared:
        first, second = names["num_attention_heads"], names["num_key_value_heads"]
        raise ValueError(f"{where}: {first} = {heads} is no multiple of {second} = {shared}")


def _check_generation(config: dict[str, Any], where: str) -> None:
    """Refuse values on which generating would fail half-way."""
    for name, value in config.items():
        values = value if name in SEVERAL and isinstance(value, list) else [value]
        kind = int if name in (*COUNTS, *SEVERAL) else int | float
        known = name in (*COUNTS, *SEVERAL, *SIZES) and value is not None
        if known and not all(isinstance(x, kind) and not isinstance(x, bool) and abs(x) < 2**63 for x in values):
            what = "a whole number" if kind is int else "a number"
            raise ValueError(f"{where}: {name} is {what}{' or several' if name in SEVERAL else ''}, not {value!r}")
        if name in SHOWN and not isinstance(value, bool | None):
            raise ValueError(f"{where}: {name} is true or false, not {value!r}")


def _check_positive(value: Any, name: str, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{where}: {name} is a positive number, not {value!r}")


def _check_rope(rope: Any, name: str, where: str, of_layers: bool = True) -> None:
    """Parameters of RoPE, or of RoPE in each type of layers if they may be `of_layers`."""
    if rope is None:
        return
    if not isinstance(rope, dict):
        raise ValueError(f"{where}: {name} is an object, not {rope!r}")
    if of_layers and rope and all(isinstance(part, dict) for part in rope.values()):
        for kind, part in rope.items():
            _check_rope(part, f"{name}.{kind}", where, of_layers=False)
        return
    known = {"default", "none", *ROPE_INIT_FUNCTIONS, *(("su",) if name == "rope_scaling" else ())}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"{where}: {name} has the type {kind!r}, and RoPE is {listed(sorted(known))}")
    for field in ("rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"):
        if rope.get(field) is not None:
            _check_positive(rope[field], f"{name}.{field}", where)


def _listed_shards(folder: Path) -> list[Path]:
    """The files that a sharded checkpoint's index names."""
    path = folder / INDEX
    if not path.is_file():
        return []
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{path} is damaged or incomplete (its weight_map is not tensor names and files); {AGAIN}")
    for tensor, name in names.items():
        if any(path.is_absolute() or ".." in path.parts for path in (PurePosixPath(name), PureWindowsPath(name))):
            raise ValueError(f"{path}: the weights in {tensor} are in {name!r}, outside of the folder; {AGAIN}")
        if not name.endswith(".safetensors"):
            raise ValueError(f"{path}: the weights in {tensor} are in {name!r}; only .safetensors files are read")
    return [folder / name for name in sorted(set(names.values()))]


def _check_shard(path: Path, quantised: bool) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing: the checkpoint is incomplete; {AGAIN}")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError("the header is cut short")
            header = parse_json(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        promised = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        if promised != size:
            raise ValueError(f"{size} bytes where its header promises {promised}")
        kinds = {name: entry["dtype"] for name, entry in tensors.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}); {AGAIN}") from None
    for name, kind in kinds.items():
        if not quantised and name.endswith(WEIGHTS) and kind not in FLOATS:
            raise ValueError(f"{path}: {name} is stored as {kind}, and weights are {listed(FLOATS)}; {AGAIN}")
