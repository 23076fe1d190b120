"""Pretraining records of synthetic runs whose constants are known."""

from collections.abc import Callable

import pytest

import synthetic_runs
from mea.records import Record


@pytest.fixture
def run() -> Callable[..., Record]:
    return synthetic_runs.synthetic
