"""Damaged files of every kind are read, or refused in words; nothing else happens."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.mutations import Ground, examples, gguf_bytes, gguf_parts, mutated_bytes, mutated_gguf, mutated_text
from fuzz.mutations import small_records as records
from mea.arguments import parse_budget
from mea.compression.budget import (
    CacheShape,
    Step,
    coded_layout,
    coded_layout_for_bytes,
    layout_for_bytes,
    layout_for_keep,
    preset_layout,
)
from mea.report.schema import check_fields

CORPUS = sorted((Path(__file__).parents[1] / "corpus").iterdir())
RANDOM = st.randoms(use_true_random=False)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("ground"))


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_files_that_failed_once(path: Path, ground: Ground) -> None:
    """``KIND-what.suffix``; of the kind "header", the JSON of a safetensors file."""
    ground.accepts(path.name.partition("-")[0], path.read_bytes())


def test_what_is_damaged_is_valid_before(ground: Ground) -> None:
    for kind, value in (("config", ground.config), ("index", ground.index), ("header", ground.header)):
        assert ground.accepts(kind, json.dumps(value).encode()), kind
    ground.read("layout", b"[[8, 8], null, [16, 24]]")
    for record in records():
        check_fields(record, "a record")
    ground.read("gguf", gguf_bytes(gguf_parts()))


@examples(250)
@given(kind=st.sampled_from(["config", "index", "header"]), random=RANDOM)
def test_json_of_a_model_folder(ground: Ground, kind: str, random: random.Random) -> None:
    ground.accepts(kind, mutated_text(getattr(ground, kind), random))


@examples(50)
@given(random=RANDOM)
def test_bytes_of_a_shard(ground: Ground, random: random.Random) -> None:
    content = ground.shard.read_bytes()
    part = random.randrange(2)  # the header is small, and most of what can be wrong is in it
    end = len(content) - ground.data
    ground.accepts("shard", mutated_bytes(content[:end], random) + content[end:] if part else content[:-1])


@examples(300)
@given(random=RANDOM)
def test_gguf_headers(ground: Ground, random: random.Random) -> None:
    ground.accepts("gguf", mutated_gguf(random))


@examples(15)
@given(random=RANDOM)
def test_records(ground: Ground, random: random.Random) -> None:
    ground.accepts("record", mutated_text(random.choice(records()), random))


@examples(100)
@given(random=RANDOM)
def test_layouts(ground: Ground, random: random.Random) -> None:
    ground.accepts("layout", mutated_text([[8, 8], None, [16, 24]], random))


DIGITS = st.text("0123456789.٣²", max_size=12) | st.just("9" * 400)
BUDGETS = st.text(max_size=20) | st.tuples(
    DIGITS, st.sampled_from(["", "k", "M", "kk"]), st.sampled_from([" tokens in ", " in ", "in", " token in\n"]),
    DIGITS,     st.sampled_from([" GiB", "b", " TB", " XB", "", "kib"]),
).map("".join)  # fmt: skip
SHAPES = st.tuples(
    st.integers(1, 4), st.sampled_from([2, 8, 6]),
    st.lists(st.none() | st.integers(2, 300), min_size=1, max_size=5).map(tuple), st.sampled_from([2, 4]),
)  # fmt: skip
STEPS = st.builds(Step, st.integers(1, 9), st.booleans())


@examples(100)
@given(text=BUDGETS, sizes=SHAPES, step=STEPS)
def test_budgets_in_words(text: str, sizes: tuple[Any, ...], step: Step) -> None:
    """A budget is met, or refused."""
    shape = CacheShape(*sizes)
    try:
        context, size = parse_budget(text)
    except ValueError:
        return
    for make in (
        lambda: layout_for_bytes(shape, context, size, step),
        lambda: coded_layout_for_bytes(shape, context, size),
    ):
        try:
            layout = make()
        except ValueError:
            continue
        assert layout.bytes(shape, context) <= size


@examples(100)
@given(
    keep=st.floats() | st.floats(0, 1),
    sizes=SHAPES,
    step=STEPS,
    context=st.integers(1, 10**6),
    name=st.sampled_from(["full", "half", "deep", ""]),
)
def test_fractions_to_keep(keep: float, sizes: tuple[Any, ...], step: Step, context: int, name: str) -> None:
    shape = CacheShape(*sizes)
    made: list[Any] = []
    for make in (
        lambda: layout_for_keep(shape, keep, step),
        lambda: preset_layout(shape, name, step, keep),
        lambda: coded_layout(shape, keep, context),
    ):
        try:
            made.append(make())
        except ValueError:
            continue
    for layout in made:
        assert layout.keep(shape) <= max(keep, 1 if name in ("half", "deep") else keep) + 1e-9
