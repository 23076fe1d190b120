"""Finished layers of an interrupted run, and output folders that appear only when complete."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from mea.compression.methods.factors import Factors, LayerFactors
from mea.compression.plan import Plan
from mea.ops.cache_forms import FORMS
from mea.records import write_atomically

SETTINGS = "run.json"


class FactorStore:
    """Factors on disk, one file per finished layer.

    Parameters
    ----------
    folder
        Created if it does not exist.
    fingerprint
        Of everything that the factors depend on, see `fingerprint`.

    Raises
    ------
    ValueError
        The folder belongs to another run.
    """

    def __init__(self, folder: Path, fingerprint: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        settings = folder / SETTINGS
        if settings.is_file():
            if json.loads(settings.read_text(encoding="utf-8")) != fingerprint:
                raise ValueError(
                    f"{folder.parent} holds an interrupted run of another model or with other settings; "
                    f"remove that folder, or give the same settings to continue"
                )
        else:
            write_file(settings, json.dumps(fingerprint))

    def get(self, index: int) -> LayerFactors | None:
        """The factors of a layer, if an earlier run finished it."""
        path = self._path(index)
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            metadata = file.metadata()
        return LayerFactors(
            Factors(tensors["key_encoder"], tensors["key_decoder"]),
            Factors(tensors["value_encoder"], tensors["value_decoder"]),
            tensors.get("output"),
            FORMS[metadata["form"]],
            int(metadata["groups"]),
        )

    def put(self, index: int, factors: LayerFactors) -> None:
        """Keep a finished layer."""
        path = self._path(index)
        if path.is_file():
            return
        tensors = {
            "key_encoder": factors.keys.encoder,
            "key_decoder": factors.keys.decoder,
            "value_encoder": factors.values.encoder,
            "value_decoder": factors.values.decoder,
        }
        if factors.output is not None:
            tensors["output"] = factors.output
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_file(path, save(tensors, {"form": factors.form.name, "groups": str(factors.groups)}))

    def get_refined(self, index: int) -> dict[str, Tensor] | None:
        """The refined weights of a layer, if an earlier run finished it."""
        path = self._path(index, "refined-")
        return load_file(path) if path.is_file() else None

    def put_refined(self, index: int, weights: dict[str, Tensor]) -> None:
        """Keep a layer's refined weights."""
        write_file(self._path(index, "refined-"), save({name: weight.contiguous() for name, weight in weights.items()}))

    def _path(self, index: int, prefix: str = "") -> Path:
        return self.folder / f"{prefix}{index:05d}.safetensors"


def fingerprint(config: Any, plan: Plan, tokens: Int[Tensor, "n t"], weights: str) -> str:
    """A hash of all that factors depend on: configuration, weights, plan and calibration tokens.

    `weights` identifies the weights and their dtype without reading them all, see
    `mea.models.loading.weights_fingerprint`.
    """
    settings = [config.to_json_string(), plan.describe(), plan.layout.ranks, tokens.tolist(), weights]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def write_file(path: Path, content: str | bytes) -> None:
    """`mea.records.write_atomically`, with an error that says how to continue.

    Raises
    ------
    OSError
        The file could not be written.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise _not_written(path, error) from error


def check_output(out: Path) -> None:
    """Refuse an output folder that is not empty.

    Raises
    ------
    ValueError
        The folder is not empty, or is a file.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; choose another, or remove it first")


def _not_written(path: Path, error: Exception) -> OSError:
    return OSError(
        f"{path} could not be written: {error}. No incomplete file is left; free disk space and repeat the same "
        f"command: finished layers are kept"
    )


@contextmanager
def complete_folder(out: Path, work: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `out` when the block ends, and removed if it fails.

    Raises
    ------
    OSError
        Writing failed, for instance because the disk is full; no incomplete file is left.
    """
    filling = work / "model"
    shutil.rmtree(filling, ignore_errors=True)
    filling.mkdir(parents=True)
    try:
        yield filling
    except BaseException as error:
        shutil.rmtree(filling, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):  # safetensors has its own error for a full disk
            raise _not_written(out, error) from error
        raise
    if out.exists():
        out.rmdir()
    os.replace(filling, out)
    shutil.rmtree(work, ignore_errors=True)
