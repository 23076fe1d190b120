"""Tiny random models that pack their caches, with codes of chosen numbers of bits."""

import copy
from functools import cache
from typing import Any

import torch

from mea.compression.calibrate.layerwise import LayerWalk
from mea.compression.coding.convert import assemble_coded, coded_config
from mea.compression.coding.fit import READINGS
from mea.compression.coding.moments import LayerMoments, layer_moments
from tiny_models import VOCABULARY, stock

FIRST, RECENT = 3, 5  # exact tokens; with the sliding window of 8, three tokens of it are read by their codes
TIERS: dict[str, list[tuple[int, int, int]]] = {"predictive": [(4, 8, 4), (0, 4, 8)], "joint": [(8, 12, 8)]}
ALL: dict[str, list[tuple[int, int, int]]] = {"predictive": [(24, 0, 0), (24, 0, 0)], "joint": [(48, 0, 0)]}


@cache
def _source(kind: str, changes: tuple[tuple[str, Any], ...]) -> tuple[Any, list[LayerMoments]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = stock(kind, **dict(changes))
        return model, layer_moments(LayerWalk(model), torch.randint(1, VOCABULARY, (4, 64)), FIRST, seed=0)


def original(kind: str, **changes: Any) -> Any:
    """A model in fp32 before its cache is packed; its experts can compute in fp64."""
    model = copy.deepcopy(_source(kind, tuple(changes.items()))[0])
    model.config._experts_implementation = "eager"
    return model


def moments(kind: str, **changes: Any) -> list[LayerMoments]:
    """Its layers' moments on random tokens."""
    return _source(kind, tuple(changes.items()))[1]


def coded(
    kind: str,
    reading: str,
    tiers: dict[str, list[tuple[int, int, int]]] | None = None,
    ordinary: bool = True,
    **changes: Any,
) -> Any:
    """The model with its first layers coded; the last one stays `ordinary`, or is coded as well.

    In fp64 sums in another order differ by 1e-16 of their size, and no component is that close to the edge between two
    codes: results are equal up to rounding. In fp32 a code may flip.
    """
    found = moments(kind, **changes)
    codes = [READINGS[reading](layer).code((tiers or TIERS)[reading]) for layer in found[: len(found) - ordinary]]
    model = original(kind, **changes)
    made = [*codes, None] if ordinary else codes
    config = coded_config(model.config, reading, (FIRST, RECENT), made, {})
    return assemble_coded(model.double(), made, config)
