"""Finished layers of an interrupted run, from which the same run continues."""

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mea.compression.methods.factors import Factors, LayerFactors
from mea.models.saving import not_written
from mea.ops.cache_forms import FORMS
from mea.records import read_json, write_atomically

SETTINGS = "run.json"
MARK = "mark"  # in the metadata of every file


class FactorStore:
    """Factors on disk, one file per finished layer; the folder is made with the first.

    Every file says which layer of which run it holds. One that is damaged, or belongs to another layer or run, does not
    count: its layer is made again.

    Parameters
    ----------
    folder
        Need not exist.
    fingerprint
        Of everything that the factors depend on, see `mea.compression.save.fingerprint`.

    Raises
    ------
    ValueError
        The folder belongs to another run, or another version of mea wrote it.
    """

    def __init__(self, folder: Path, fingerprint: str):
        self.folder, self.fingerprint = folder, fingerprint
        self.seconds = 0.0  # of the interrupted run, up to the state that was read
        settings = folder / SETTINGS
        if any(folder.glob("*.safetensors")) and (not settings.is_file() or _read(settings) != fingerprint):
            raise ValueError(
                f"{folder.parent} holds an interrupted run of another model or with other settings; "
                f"remove that folder, or give the same settings to continue"
            )
        for path in folder.glob("*.safetensors"):
            self._open(path)

    def get(self, index: int) -> LayerFactors | None:
        """The factors of a layer, if an earlier run finished it.

        Raises
        ------
        ValueError
            Another version of mea wrote them.
        """
        tensors, metadata = self._get("factors", index)
        if tensors is None:
            return None
        return LayerFactors(
            Factors(tensors["key_encoder"], tensors["key_decoder"]),
            Factors(tensors["value_encoder"], tensors["value_decoder"]),
            tensors.get("output"),
            FORMS[metadata["form"]],
            int(metadata["groups"]),
        )

    def put(self, index: int, factors: LayerFactors) -> None:
        """Keep a finished layer."""
        tensors = {
            "key_encoder": factors.keys.encoder,
            "key_decoder": factors.keys.decoder,
            "value_encoder": factors.values.encoder,
            "value_decoder": factors.values.decoder,
        }
        if factors.output is not None:
            tensors["output"] = factors.output
        self._put("factors", index, tensors, {"form": factors.form.name, "groups": str(factors.groups)})

    def get_refined(self, index: int) -> dict[str, Tensor] | None:
        """The refined weights of a layer, if an earlier run finished it."""
        return self.get_tensors("refined", index)

    def put_refined(self, index: int, weights: dict[str, Tensor]) -> None:
        """Keep a layer's refined weights."""
        self.put_tensors("refined", index, weights)

    def get_tensors(self, kind: str, index: int) -> dict[str, Tensor] | None:
        """Tensors of a layer that an earlier run kept under this name."""
        return self._get(kind, index)[0]

    def put_tensors(self, kind: str, index: int, tensors: dict[str, Tensor]) -> None:
        """Keep tensors of a layer under a name."""
        self._put(kind, index, tensors, {})

    def get_state(self, kind: str) -> tuple[int, dict[str, Tensor]]:
        """The newest state that `put_state` kept under this name and its number; 0 and nothing without one."""
        for path in sorted(self.folder.glob(f"{kind}-*.safetensors"), reverse=True):
            index = int(path.stem.rpartition("-")[2])
            if (tensors := self.get_tensors(kind, index)) is not None:
                return index, tensors
        return 0, {}

    def put_state(self, kind: str, index: int, tensors: dict[str, Tensor]) -> None:
        """Keep a state under a name, instead of those with lower numbers."""
        self.put_tensors(kind, index, tensors)
        for path in self.folder.glob(f"{kind}-*.safetensors"):
            if path != self._path(kind, index):
                path.unlink(missing_ok=True)

    def _get(self, kind: str, index: int) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        tensors, metadata = self._open(self._path(kind, index))
        same = tensors is not None and metadata[MARK] == self._mark(kind, index, tensors)
        return (tensors if same else None), metadata

    def _open(self, path: Path) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Tensors and metadata of a file; None if it is damaged or not there."""
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                metadata = file.metadata() or {}
        except (SafetensorError, OSError, ValueError):
            return None, {}
        if MARK not in metadata or metadata.get("form", "post_rope") not in FORMS:
            raise ValueError(
                f"{self.folder.parent} holds an interrupted run of another version of mea; remove that folder to begin "
                "again"
            )
        return tensors, metadata

    def _put(self, kind: str, index: int, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        if self._get(kind, index)[0] is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(self.folder / SETTINGS, json.dumps(self.fingerprint))
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_file(self._path(kind, index), save(tensors, {**metadata, MARK: self._mark(kind, index, tensors)}))

    def _mark(self, kind: str, index: int, tensors: dict[str, Tensor]) -> str:
        """Tells a file from those of other layers and runs, and from a damaged one."""
        checksum = 0
        for name in sorted(tensors):
            checksum = zlib.crc32(tensors[name].cpu().flatten().view(torch.uint8).numpy().data, checksum)
        return f"{self.fingerprint} {kind} {index} {checksum:08x}"

    def _path(self, kind: str, index: int) -> Path:
        return self.folder / f"{'' if kind == 'factors' else f'{kind}-'}{index:05d}.safetensors"


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except ValueError:
        return None


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
        raise not_written(path, error) from error
