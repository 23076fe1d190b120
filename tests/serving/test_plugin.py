"""What can be said of the plugin where vLLM is not installed."""

import tomllib
from pathlib import Path

import pytest

from coded_models import coded
from mea.models.latent_attention import COMPRESSED_MODELS, SUPPORTED
from mea.vllm import PREFIXES

ROOT = Path(__file__).parents[2]


def test_every_architecture_has_a_served_class():
    assert set(PREFIXES) == {prefix for _, prefix in SUPPORTED.values()}


def test_vllm_finds_the_plugin():
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points == {"vllm.general_plugins": {"mea": "mea.vllm:register"}}


@pytest.mark.parametrize("kind", SUPPORTED)
def test_an_engine_that_asks_is_told_what_to_install(kind):
    with pytest.raises(NotImplementedError, match=r"pip install 'mea\[vllm\]'"):
        COMPRESSED_MODELS[kind].is_backend_compatible()


def test_the_saved_modelling_file_says_so_too(tmp_path):
    coded("llama", "predictive").save_pretrained(tmp_path)
    assert "pip install 'mea[vllm]'" in (tmp_path / "modeling_mea.py").read_text()
