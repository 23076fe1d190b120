"""Other packages' methods, each run by the Python of its own environment; nothing of them is imported here.

A peer is a script beside this file. It gets a folder with ``request.json`` (the model's folder, ``context``, ``dtype``;
``calibration``: texts, and ``calibration_window``: how many tokens each has; ``runs``: a list of ``name`` and
``ratio``, the share to drop) and ``tokens.safetensors`` (windows ``[n, t]``), and leaves ``<number of the
run>.safetensors`` (losses ``[n, scored]``) and ``<number>.json`` (``bytes_per_token``, ``versions``; or ``error``).
"""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from mea.records import read_json

SCRIPTS = {name: Path(__file__).with_name(f"{name}_run.py") for name in ("kvpress", "cacheshrink")}
CHECK_SECONDS = 300


class PeerResult(NamedTuple):
    """Result of a peer's run; without losses it did not run, and `error` says why."""

    losses: Tensor | None
    bytes_per_token: float = 0.0
    versions: dict[str, str] | None = None
    error: str = ""


def run_peer(
    peer: str,
    python: str | None,
    folder: Path,
    model: Path,
    tokens: Int[Tensor, "n t"],
    runs: list[dict[str, Any]],
    *,
    context: int,
    dtype: str,
    calibration: Sequence[str] = (),
    calibration_window: int = 0,
) -> list[PeerResult]:
    """Score the continuations of windows with a peer, in its own environment; a missing peer is not an error.

    Parameters
    ----------
    peer
        A name in `SCRIPTS`.
    python
        The interpreter of the environment that the peer is installed in.
    folder
        Folder of the exchanged files.
    model
        Folder of the uncompressed model.
    runs
        ``name`` and ``ratio`` each.
    calibration, calibration_window
        Texts for a peer that calibrates, and how many tokens each has.
    """
    if python is None:
        return [PeerResult(None, error="no environment with it was given")] * len(runs)
    try:
        check = subprocess.run([python, "-c", f"import {peer}"], capture_output=True, text=True, timeout=CHECK_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [PeerResult(None, error=f"{Path(python).name} could not be run ({type(error).__name__})")] * len(runs)
    if check.returncode:
        return [PeerResult(None, error=f"{peer} is not installed in the environment that was given")] * len(runs)
    folder.mkdir(parents=True, exist_ok=True)
    request = {
        "model": str(model), "context": context, "dtype": dtype, "runs": runs,
        "calibration": list(calibration), "calibration_window": calibration_window,
    }  # fmt: skip
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    save_file({"tokens": tokens.contiguous()}, folder / "tokens.safetensors")
    done = subprocess.run([python, str(SCRIPTS[peer]), str(folder)], capture_output=True, text=True)
    words = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
    return [_read(folder, number, words) for number in range(len(runs))]


def _read(folder: Path, number: int, words: str) -> PeerResult:
    path = folder / f"{number}.json"
    if not path.is_file():
        return PeerResult(None, error=f"the peer's script failed: {words}")
    result = read_json(path)
    if "error" in result:
        return PeerResult(None, error=result["error"])
    losses = load_file(folder / f"{number}.safetensors")["losses"]
    return PeerResult(losses, result["bytes_per_token"], result["versions"])
