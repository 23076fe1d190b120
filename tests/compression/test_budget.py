"""Budgets become ranks: never above the budget, and less than one step under it."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from compression.small import planned
from mea.arguments import parse_budget
from mea.compression.budget import (
    CacheShape,
    Layout,
    Step,
    layout_for_bytes,
    layout_for_keep,
    preset_layout,
    read_layout,
)
from mea.compression.methods import METHODS

FINE = Step(8)
QWEN3_30B = CacheShape(4, 128, (None,) * 48, 2)  # 48 layers, 4 kv heads of 128


@pytest.mark.parametrize(
    ("text", "tokens", "size"),
    [
        ("64k tokens in 2 GiB", 65536, 2 * 2**30),
        ("8192 in 100 MB", 8192, 100_000_000),
        ("8192 tokens in 100 MiB", 8192, 100 * 2**20),
        ("1M tokens in 1.5TB", 2**20, 1_500_000_000_000),
        ("  0.5k token in 3 kib ", 512, 3072),
        ("10 tokens in 4096 B", 10, 4096),
    ],
)
def test_budget_is_read(text: str, tokens: int, size: int) -> None:
    assert parse_budget(text) == (tokens, size)


@pytest.mark.parametrize(
    "text",
    ["2 GiB", "64k tokens", "64k tokens in 2", "64k tokens in GiB", "-1k tokens in 2 GiB", "1.2.3k tokens in 2 GiB",
     "64k tokens in . GiB", "64q tokens in 2 GiB", "0 tokens in 2 GiB", "64k tokens in 0 B", "64k tokens in 2 iB", ""],
)  # fmt: skip
def test_malformed_budget_is_refused_with_the_form_it_should_have(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text)) + "|at least one token") as error:
        parse_budget(text)
    assert "a budget" in str(error.value)


SHAPES = st.tuples(  # heads, head dimension, windows, bytes per number
    st.integers(1, 8),
    st.sampled_from([8, 16, 64, 80]),
    st.lists(st.sampled_from([None, 2, 5, 33]), min_size=1, max_size=9).map(tuple),
    st.sampled_from([2, 4]),
)


def steps_of(shape: CacheShape, whole_heads: bool) -> Step:
    return Step(shape.head_dim, paired=False) if whole_heads else FINE


def smallest(shape: CacheShape, step: Step) -> Layout:
    return Layout((step.ranks(1 if step.paired else 2),) * len(shape.windows))


@given(SHAPES, st.integers(1, 200), st.floats(0.01, 1.2), st.booleans())
def test_bytes_are_never_above_a_byte_budget_and_less_than_one_step_under_it(
    sizes: tuple, context: int, share: float, whole_heads: bool
) -> None:
    shape = CacheShape(*sizes)
    step = steps_of(shape, whole_heads)
    budget = int(share * shape.bytes(context))
    if smallest(shape, step).bytes(shape, context) > budget:
        with pytest.raises(ValueError, match="no layout meets"):
            layout_for_bytes(shape, context, budget, step)
        return
    layout = layout_for_bytes(shape, context, budget, step)
    promise = layout.bytes(shape, context)
    assert promise <= budget
    wider = [
        step.numbers * shape.tokens(layer, context) * shape.itemsize
        for layer, ranks in enumerate(layout.ranks)
        if ranks is not None and sum(ranks) + step.numbers <= 2 * shape.width
    ]
    assert not wider or budget - promise < min(wider)


@given(SHAPES, st.floats(0.01, 1.0), st.integers(1, 200), st.booleans())
def test_bytes_are_never_above_the_kept_fraction_and_less_than_one_step_under_it(
    sizes: tuple, keep: float, context: int, whole_heads: bool
) -> None:
    shape = CacheShape(*sizes)
    step = steps_of(shape, whole_heads)
    whole = shape.bytes(1)
    if smallest(shape, step).bytes(shape, 1) > keep * whole * (1 + 1e-9):
        with pytest.raises(ValueError, match="no layout meets"):
            layout_for_keep(shape, keep, step)
        return
    layout = layout_for_keep(shape, keep, step)
    assert layout.bytes(shape, 1) <= keep * whole * (1 + 1e-9)
    if keep < 1:
        assert layout.bytes(shape, 1) > keep * whole - step.numbers * shape.itemsize
    # A full window changes which layers count, and must not carry the cache above its budget.
    assert layout.bytes(shape, context) <= keep * shape.bytes(context) * (1 + 1e-9)


@given(SHAPES, st.floats(0.1, 1.0))
def test_ranks_of_a_fraction_differ_by_one_step_at_most(sizes: tuple, keep: float) -> None:
    shape = CacheShape(*sizes)
    assume(smallest(shape, FINE).keep(shape) <= keep)
    layout = layout_for_keep(shape, keep, FINE)
    keys = [ranks[0] for ranks in layout.ranks if ranks]
    assert all(ranks and ranks[0] == ranks[1] for ranks in layout.ranks)
    assert max(keys) - min(keys) <= FINE.size


@pytest.mark.parametrize(
    ("name", "first", "last"), [("full", 1, 48), ("half", 12, 35), ("deep", 4, 48)]
)  # counted from 1, as in arXiv 2601.19611
@pytest.mark.parametrize("method", list(METHODS))
def test_presets_are_the_papers(name: str, first: int, last: int, method: str) -> None:
    layout = preset_layout(QWEN3_30B, name, METHODS[method].step(128))
    expected = [(256, 256) if first <= layer <= last else None for layer in range(1, 49)]
    assert list(layout.ranks) == expected


@pytest.mark.parametrize("count", [1, 2, 3, 4, 30])
def test_presets_of_other_depths_compress_something(count: int) -> None:
    shape = CacheShape(2, 16, (None,) * count, 2)
    for name in ("full", "deep", *(["half"] if count > 1 else [])):
        assert any(preset_layout(shape, name, FINE).ranks), name


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ValueError, match="full, half, deep, not 'quarter'"):
        preset_layout(QWEN3_30B, "quarter", FINE)


def test_an_odd_head_goes_to_the_values() -> None:
    shape = CacheShape(3, 64, (None,) * 30, 2)
    layout = layout_for_keep(shape, 0.5, METHODS["svd"].step(64))
    assert set(layout.ranks) == {(64, 128)}
    assert layout.keep(shape) == 0.5


def test_a_budget_that_no_layout_meets_says_what_the_smallest_takes() -> None:
    shape = CacheShape(4, 64, (None,) * 2, 2)
    with pytest.raises(ValueError, match=r"no layout meets keep 0\.1: the smallest takes 512 bytes, and 2") as error:
        layout_for_keep(shape, 0.1, Step(64, paired=False))  # one head of four is 0.25
    assert "finer steps" in str(error.value)
    with pytest.raises(ValueError, match="no layout meets 5000 bytes for 100 tokens"):
        layout_for_bytes(shape, 100, 5000, FINE)


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.5, float("nan")])
def test_an_impossible_fraction_is_refused(keep: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        layout_for_keep(QWEN3_30B, keep, FINE)


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_layout_file_is_read(tmp_path: Path) -> None:
    shape = CacheShape(2, 16, (None,) * 3, 2)
    path = write(tmp_path / "layout.json", [[8, 16], None, [32, 32]])
    assert read_layout(path, shape, FINE).ranks == ((8, 16), None, (32, 32))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([[8, 8], None], "list of 3 entries"),
        ({"ranks": []}, "list of 3 entries"),
        ([[8, 8], None, [8, 40]], r"layer 2: .* from 8 to 32 .* not \[8, 40\]"),
        ([[8, 8], None, [8, 12]], r"layer 2: .* multiples of 8"),
        ([[8, 8], [0, 8], None], "layer 1"),
        ([[8, 8], [8], None], "layer 1"),
        ([[8, 8], [8.0, 8], None], "layer 1"),
        ([[True, 8], None, None], "layer 0"),
        ("[[8, 8], ", "is not JSON"),
    ],
)
def test_a_bad_layout_file_is_refused(content: object, message: str, tmp_path: Path) -> None:
    shape = CacheShape(2, 16, (None,) * 3, 2)
    with pytest.raises(ValueError, match=message):
        read_layout(write(tmp_path / "layout.json", content), shape, FINE)


def test_a_mistyped_layout_name_lists_the_names(tmp_path: Path) -> None:
    shape = CacheShape(2, 16, (None,) * 3, 2)
    with pytest.raises(ValueError, match="full, half, deep"):
        read_layout(tmp_path / "hlaf", shape, FINE)


def test_one_budget_at_a_time() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2)
    for options in ({"keep": 0.5, "budget": "1k in 1 MB"}, {"layout": "half", "budget": "1k in 1 MB"}):
        with pytest.raises(ValueError, match="give one budget"):
            planned(config, **options)
