"""The mask rule, stated once more as a loop over every pair of tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mea.ops.masks import attention_mask, interleave


@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, 9),
    past=st.integers(0, 5),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 6),
    padded=st.booleans(),
    packed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_every_pair_follows_the_rule(queries, past, causal, window, padded, packed, seed):
    keys = queries + past
    generator = torch.Generator().manual_seed(seed)
    padding = torch.rand(2, keys, generator=generator) < 0.7 if padded else None
    documents = torch.randint(0, 3, (2, keys), generator=generator) if packed else None
    mask = attention_mask(queries, keys, causal=causal, window=window, padding=padding, documents=documents)
    mask = mask.expand(2, 1, queries, keys)
    for b in range(2):
        for i in range(queries):
            q = past + i
            for k in range(keys):
                see = q == k or (
                    (not causal or k <= q)
                    and (window is None or abs(q - k) < window)
                    and (padding is None or bool(padding[b, k]))
                    and (documents is None or bool(documents[b, q] == documents[b, k]))
                )
                assert mask[b, 0, i, k].item() == see


@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, 5),
    past=st.integers(0, 4),
    empty=st.integers(0, 2),
    copies=st.integers(1, 3),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 4),
    padded=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_copies_see_what_their_tokens_see_and_no_later_copy_of_their_own(
    queries, past, empty, copies, causal, window, padded, seed
):
    """With empty slots behind the keys, as in a cache of fixed length."""
    generator = torch.Generator().manual_seed(seed)
    padding = torch.rand(2, queries + past, generator=generator) < 0.7 if padded else None
    mask = attention_mask(queries, queries + past, causal=causal, window=window, padding=padding)
    mask = torch.nn.functional.pad(mask, (0, empty))
    wide = interleave(mask, copies, causal=causal)
    assert wide.shape == (len(mask), 1, copies * queries, copies * mask.shape[-1])
    for b in range(len(mask)):
        for i in range(copies * queries):
            for k in range(copies * mask.shape[-1]):
                token, key = i // copies, k // copies
                own = key == past + token
                see = mask[b, 0, token, key] and not (causal and own and k % copies > i % copies)
                assert wide[b, 0, i, k].item() == see


def test_more_queries_than_keys_are_refused():
    with pytest.raises(ValueError, match="the 5 queries"):
        attention_mask(5, 3)
