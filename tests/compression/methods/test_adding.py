"""docs/adding_a_method.md is true: its file is a method, and its line registers it."""

import re
import sys
from importlib import reload
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from compression.small import tiny
from mea import names
from mea.compression import Calibration, methods
from mea.evaluate.perplexity import token_losses
from mea.text import encode_text, load_text

GUIDE = (Path(__file__).parents[3] / "docs" / "adding_a_method.md").read_text(encoding="utf-8")


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The guide's method in its place; yields the code that uses it."""
    file, use = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    name, place = re.findall(r"```\n    \"(\w+)\": \"(\w+)\",\n```", GUIDE)[0]
    module = ModuleType(f"mea.compression.methods.{place}")
    exec(compile(file, module.__name__, "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(names.METHODS, name, place)
    before = dict(methods.METHODS)
    found = dict.fromkeys([*before, *(method.label for method in module.METHODS)])
    reload(methods)
    assert list(methods.METHODS) == list(found)
    yield use
    monkeypatch.undo()
    reload(methods)
    assert list(methods.METHODS) == list(before)


def test_the_method_of_the_guide_compresses(
    code: str, tokenizer: PreTrainedTokenizerFast, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found by name, passes the self-checks, and loses less with more of the cache."""
    from mea.compression import plan

    monkeypatch.setattr(plan, "find_method", methods.find_method)
    model = tiny()
    text = encode_text(tokenizer, load_text("technical"), 256)
    losses = []
    for keep in (0.5, 1.0):
        scope: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "calibration": calibration}
        exec(code.replace("keep=0.5", f"keep={keep}, calibration=calibration"), scope)
        assert scope["small"].config.compression["method"] == "pca"
        losses.append(token_losses(scope["small"], text, 64).mean().item())
    plain = token_losses(model, text, 64).mean().item()
    assert losses[1] == pytest.approx(plain, abs=1e-4)
    assert losses[0] > losses[1]
