"""Finished layers of an interrupted run, from which the same run continues."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from mea.compression.methods.factors import Factors, LayerFactors
from mea.models.saving import not_written
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
        Of everything that the factors depend on, see `mea.compression.save.fingerprint`.

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
        """The factors of a layer, if an earlier run finished it.

        Raises
        ------
        ValueError
            Another version of mea wrote them.
        """
        path = self._path(index)
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            metadata = file.metadata() or {}
        if metadata.get("form") not in FORMS or "groups" not in metadata:
            raise ValueError(
                f"{self.folder.parent} holds an interrupted run of another version of mea; remove that folder to begin "
                "again"
            )
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
        return self.get_tensors("refined", index)

    def put_refined(self, index: int, weights: dict[str, Tensor]) -> None:
        """Keep a layer's refined weights."""
        self.put_tensors("refined", index, weights)

    def get_tensors(self, kind: str, index: int) -> dict[str, Tensor] | None:
        """Tensors of a layer that an earlier run kept under this name."""
        path = self._path(index, f"{kind}-")
        return load_file(path) if path.is_file() else None

    def put_tensors(self, kind: str, index: int, tensors: dict[str, Tensor]) -> None:
        """Keep tensors of a layer under a name."""
        write_file(self._path(index, f"{kind}-"), save({name: tensor.contiguous() for name, tensor in tensors.items()}))

    def _path(self, index: int, prefix: str = "") -> Path:
        return self.folder / f"{prefix}{index:05d}.safetensors"


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
