"""Records of other packages' methods, scored on continuations next to this package's."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from mea.comparison.configs import MethodConfig
from mea.comparison.peers import PeerResult, run_peer
from mea.comparison.quality import Quality
from mea.evaluate.perplexity import block_means
from mea.records import Record, make_record
from mea.text import start_token, windows


def peer_records(
    peer: str,
    python: str | None,
    configs: Sequence[MethodConfig],
    model: Any,
    quality: Quality,
    settings: dict[str, Any],
    calibration: Int[Tensor, "n t"],
) -> list[Record]:
    """Records of a peer's methods; one that cannot run says so in its record.

    Parameters
    ----------
    peer, python
        As in `mea.comparison.peers.run_peer`.
    configs
        The methods.
    model
        The uncompressed one, in the dtype to score in.
    quality
        With the uncompressed model's losses.
    settings
        Part of every record's configuration.
    calibration
        The windows that this package's methods are fitted on.
    """
    tokenizer, protocol = quality.tokenizer, quality.protocol
    runs = [{"name": config.method.split()[1], "ratio": 1 - config.keep} for config in configs]
    scored: dict[str, list[PeerResult]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if python is not None:
            model.save_pretrained(folder / "model")
            tokenizer.save_pretrained(folder / "model")
        for text, count in protocol.texts:
            rows = windows(quality.tokens(text, count), protocol.window, start_token(tokenizer))
            scored[text] = run_peer(
                peer, python, folder / text, folder / "model", rows, runs, context=protocol.context,
                dtype=protocol.dtype, calibration=tokenizer.batch_decode(calibration),
                calibration_window=calibration.shape[1],
            )  # fmt: skip
    return [
        _record(config, {text: results[number] for text, results in scored.items()}, quality, settings)
        for number, config in enumerate(configs)
    ]


def _record(config: MethodConfig, results: dict[str, PeerResult], quality: Quality, settings: dict[str, Any]) -> Record:
    described = settings | {"label": config.label, "method": config.method, "keep": config.keep}
    error = next((result.error for result in results.values() if result.losses is None), None)
    if error is not None:
        return make_record("comparison", described, results={"not_run": error})
    losses = {text: result.losses for text, result in results.items() if result.losses is not None}
    first = next(iter(results.values()))
    return make_record(
        "comparison",
        described | {"peer_versions": first.versions},
        results={
            "continuations": {text: quality.continued(text, part) for text, part in losses.items()},
            "cache": {"bytes_per_token": first.bytes_per_token, "tokens": quality.protocol.context},
        },
        samples={f"continued_{text}": block_means(part) for text, part in losses.items()},
    )
