"""What every test may use: the same random numbers each time, derived tolerances, and a small saved model with text."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # an attempt to reach a hub fails at once, not after retries

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels then run on processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from compression.small import byte_tokenizer, tiny
from mea.compression import Calibration
from mea.text import load_text

quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("tests", deadline=None, derandomize=True, suppress_health_check=quiet)
settings.register_profile("fuzz", deadline=None, print_blob=True, suppress_health_check=quiet)  # of `make fuzz`
settings.load_profile("fuzz" if "FUZZ_SECONDS" in os.environ else "tests")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def agree() -> Callable[..., None]:
    """Assert that two results differ by rounding only.

    A chain of sums over n terms is off by at most n ulps of the largest partial sum (Higham, Accuracy and Stability of
    Numerical Algorithms, section 3.1), and both sides are such chains: the bound is 2 n eps max(1, |expected|), for
    inputs of size 1. `terms` is n: the lengths of all contractions on the way to one output number, added.
    """

    def check(actual: Tensor, expected: Tensor, terms: int, what: str = "result") -> None:
        assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
        eps = max(torch.finfo(x.dtype).eps for x in (actual, expected))
        bound = 2 * terms * eps * max(1.0, expected.abs().max().item())
        error = (actual - expected).abs().max().item()
        assert error <= bound, f"{what}: error {error:.2e} above the rounding bound {bound:.2e}"

    return check


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """As little text as is allowed, none of it twice."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(load_text("calibration")[:4000], encoding="utf-8")
    return Calibration(str(path), tokens=256, window=64, copy_fraction=0.0)


@pytest.fixture
def saved(tokenizer: Any, tmp_path: Path) -> Path:
    """A folder with a tiny Llama and its tokenizer."""
    folder = tmp_path / "original"
    tiny().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
