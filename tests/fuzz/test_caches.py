"""Caches under any sequence of operations hold what plain tensors hold that went through the same operations."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from fuzz.mutations import examples
from mea.models.packed_cache import PackedLayer
from mea.models.quantized_cache import CacheFormat, QuantisedLayer, Store

HEADS, DIM, MOST_ROWS = 2, 4, 6
SIZES = st.sampled_from([1, 1, 1, 2, 3, 7, 20])


def encode(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """A code that loses nothing: the bytes of keys and values."""
    both = torch.cat([keys, values], -1).transpose(1, 2).flatten(2)
    return both.contiguous().view(torch.uint8), both[..., :1].bfloat16()


def decoded(codes: Tensor) -> tuple[Tensor, Tensor]:
    both = codes.contiguous().view(torch.float32).unflatten(-1, (HEADS, 2 * DIM)).transpose(1, 2)
    return both[..., :DIM], both[..., DIM:]


class Machine(RuleBasedStateMachine):
    """Rows of random tokens; `keys` and `values` hold all of them, ``[b, h, t, d]``."""

    layer: Any
    keys: Tensor
    values: Tensor

    def begin(self, layer: Any, rows: int) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.layer, self.keys, self.values = layer, *self.fresh(rows, 0)

    def fresh(self, rows: int, size: int) -> tuple[Tensor, Tensor]:
        new = torch.randn(2, rows, HEADS, size, DIM, generator=self.generator)
        return new[0], new[1]

    def add(self, size: int) -> tuple[Tensor, Tensor]:
        """New tokens, which the oracle has from now on."""
        new = self.fresh(len(self.keys), size)
        self.keys, self.values = torch.cat([self.keys, new[0]], 2), torch.cat([self.values, new[1]], 2)
        return new

    def choose(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]

    @rule(seed=st.integers(0, 99))
    def reorder(self, seed: int) -> None:
        rows = torch.randint(len(self.keys), (len(self.keys),), generator=torch.Generator().manual_seed(seed))
        self.layer.reorder_cache(rows)
        self.choose(rows)

    @rule(data=st.data())
    def select(self, data: Any) -> None:
        rows = torch.tensor(
            data.draw(st.lists(st.integers(0, len(self.keys) - 1), min_size=1, max_size=len(self.keys)))
        )
        self.layer.batch_select_indices(rows)
        self.choose(rows)

    @precondition(lambda self: 2 * len(self.keys) <= MOST_ROWS)
    @rule()
    def repeat(self) -> None:
        self.layer.batch_repeat_interleave(2)
        self.choose(torch.arange(len(self.keys)).repeat_interleave(2))

    @rule()
    def copy_and_move(self) -> None:
        before, self.layer = self.layer, copy.deepcopy(self.layer)
        before._change(torch.zeros_like)  # what a copy shares with its original would be lost
        self.layer.offload()
        self.layer.prefetch()

    @rule()
    def reset(self) -> None:
        self.layer.reset()
        self.keys, self.values = self.keys[:, :, :0], self.values[:, :, :0]
        assert self.layer.stored() == []

    @invariant()
    def length_is_known(self) -> None:
        assert self.layer.get_seq_length() == self.keys.shape[2]


class PackedMachine(Machine):
    """Of a packed layer; what is read of every slot that a query can see is the token itself."""

    @initialize(
        rows=st.integers(1, 3),
        first=st.integers(0, 4),
        recent=st.sampled_from([1, 3, 8]),
        window=st.sampled_from([None, None, 2, 5, 9, 30]),
    )
    def start(self, rows: int, first: int, recent: int, window: int | None) -> None:
        self.begin(PackedLayer(first, recent, window), rows)

    @rule(size=SIZES)
    def append(self, size: int) -> None:
        self.check(self.layer.append(*self.add(size), encode), size)

    @rule()
    def push(self) -> None:
        """As the kernel does: in place, or not at all."""

        def move(held: Any, new: Any) -> None:
            for tensor, token in zip(held, new, strict=True):
                tensor.copy_(torch.cat([tensor[:, :, 1:], token], 2))

        new = self.add(1)
        held = self.layer.push(*new, move)
        self.check(self.layer.append(*new, encode) if held is None else held, 1)

    @rule()
    def record(self) -> None:
        self.layer.activate_past_recording()

    @rule(data=st.data())
    def crop(self, data: Any) -> None:
        total = self.keys.shape[2]
        removed = data.draw(st.integers(0, min(total, 40)))
        try:
            self.layer.crop(-removed)
        except RuntimeError:
            assert self.layer.sliding_window is not None
            assert total >= self.layer.sliding_window  # some tokens were dropped
            return
        self.keys, self.values = self.keys[:, :, : total - removed], self.values[:, :, : total - removed]

    def check(self, held: Any, size: int) -> None:
        """Of `size` new tokens: exact ones and codes are the oracle's, and leave out none that is visible."""
        total, layer = self.keys.shape[2], self.layer
        assert held.total == total
        exact = total - held.keys.shape[2]
        stop = held.begin + held.codes.shape[1]
        assert exact <= total - size  # a token sees itself exactly
        for found, true in ((held.keys, self.keys), (held.values, self.values)):
            assert torch.equal(found, true[:, :, exact:])
        if held.codes.shape[1]:
            for found, true in zip(decoded(held.codes), (self.keys, self.values), strict=True):
                assert torch.equal(found, true[:, :, held.begin : stop])
        window = layer.sliding_window
        seen = 0 if window is None else max(0, total - size - window + 1)  # by the oldest new token
        assert min(held.begin, exact) <= seen
        assert exact <= max(0, total - layer.recent) or stop >= exact  # nothing between codes and exact tokens
        assert stop >= total - layer.recent
        assert stop <= total
        if held.first is not None and stop:
            first = min(layer.first_count, stop)
            for found, true in ((held.first_keys, self.keys), (held.first_values, self.values)):
                assert torch.equal(found[:, :, :first], true[:, :, :first])


class QuantisedMachine(Machine):
    """Of a quantised layer; it reads as one that gets the same rows at once."""

    @initialize(
        rows=st.integers(1, 3),
        bits=st.sampled_from([2, 4, 8]),
        keys=st.sampled_from(["channel", "token"]),
        values=st.sampled_from(["channel", "token"]),
        block=st.sampled_from([8, 9, 16]),
        first=st.integers(0, 5),
        group=st.sampled_from([1, 2, 3, 32]),
    )
    def start(self, rows: int, **form: Any) -> None:
        self.form = CacheFormat(**form)
        self.begin(QuantisedLayer(self.form), rows)

    @rule(size=st.sampled_from([0, 1, 1, 2, 7, 20, 33]))
    def update(self, size: int) -> None:
        new = self.add(size)
        read = self.layer.update(*new)
        for found, store, true in zip(read, ("keys", "values"), (self.keys, self.values), strict=True):
            whole = Store(self.form, getattr(self.form, store))
            whole.append(true[:, :, : true.shape[2] - size])
            assert torch.equal(found, whole.append(true[:, :, true.shape[2] - size :]))

    @rule()
    def crop(self) -> None:
        with pytest.raises(NotImplementedError, match="cannot remove tokens"):
            self.layer.crop(-1)


TestPackedLayer = PackedMachine.TestCase
TestQuantisedLayer = QuantisedMachine.TestCase
TestPackedLayer.settings = examples(40)
TestQuantisedLayer.settings = examples(25)
