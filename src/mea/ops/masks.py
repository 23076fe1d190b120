"""Attention masks: causality, sliding windows, padding and packed documents as one rule."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def attention_mask(
    queries: int,
    keys: int | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    padding: Bool[Tensor, "b s"] | None = None,
    documents: Int[Tensor, "b s"] | None = None,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "#b 1 t s"]:
    """Build a mask that is true where a query may attend.

    Parameters
    ----------
    queries, keys
        Numbers of query and key tokens, ``t`` and ``s``; the queries are the last ``t`` of the ``s`` tokens. None means
        ``s = t``.
    causal
        No token attends to a later one.
    window
        A token attends to itself and the ``window - 1`` tokens before it (and as many after it when not causal).
    padding
        True for real tokens, as a Hugging Face attention mask is 1 for them.
    documents
        Number of each token's document; tokens of different documents packed into one row do not attend to each other.

    Notes
    -----
    Every token attends to itself, padding included. A row without visible tokens would be 0/0 in the softmax, and a NaN
    in an unused position still makes every gradient NaN.
    """
    keys = queries if keys is None else keys
    if keys < queries:
        raise ValueError(f"the {queries} queries are the last of the keys, so give at least as many keys, not {keys}")
    per_row = next((x for x in (padding, documents) if x is not None), None)
    device = device if per_row is None else per_row.device
    q = torch.arange(keys - queries, keys, device=device)[:, None]
    k = torch.arange(keys, device=device)
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if causal:
        visible = visible & (k <= q)
    if window is not None:
        visible = visible & ((q - k).abs() < window)
    visible = visible[None, None]
    if documents is not None:
        visible = visible & (documents[:, None, keys - queries :, None] == documents[:, None, None, :])
    if padding is not None:
        visible = visible & (padding[:, None, None, :] | (k == q))
    return visible


def interleave(mask: Bool[Tensor, "#b 1 t s"], copies: int, *, causal: bool = True) -> Bool[Tensor, "#b 1 _ _"]:
    """The mask of a sequence in which every token stands `copies` times in a row.

    Parameters
    ----------
    mask
        Mask of the tokens. With `causal`, the last key that a query may attend to is taken to be the query's own token.
    causal
        No copy attends to a later copy of its own token.

    Returns
    -------
    A mask ``[#b, 1, copies t, copies s]``.
    """
    visible = mask[..., :, None, :, None].expand(*mask.shape[:-1], copies, mask.shape[-1], copies)
    if causal:
        own = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
        place = torch.arange(copies, device=mask.device)
        later = place[:, None, None] < place
        visible = visible & ~(own[..., :, None, :, None] & later)
    return visible.flatten(-2).flatten(-3, -2)
