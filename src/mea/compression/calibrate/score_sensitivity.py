"""Second moments of keys and queries, weighted by the effect of score errors on the attention output.

To first order an error ``e`` in the score of query ``i`` and key ``j`` changes a head's output by ``a_ij (v_j - o_i)
e``, with the attention map ``a``, the value ``v_j`` and the head's output ``o_i``. The squared change of the output of
``W_O`` is ``c_ij e^2``,

    c_ij = a_ij^2 |W_O (v_j - o_i)|^2.

Errors of different scores are assumed independent. The weight of a key is the sum of ``c_ij`` over queries and heads,
the weight of a query the sum over keys: a token with much attention, such as the first of a text, has a larger weight
than a token with none. The first token is always at position 0, so its moment is separate and is not averaged over
positions.
"""

import sys
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mea.compression.calibrate.layerwise import AttentionPass, LayerInputs
from mea.compression.calibrate.statistics import EVERY, Projected, ScoreMoments, head_scale, project


class ScoreMomentsSum:
    """Adds up `ScoreMoments` over windows.

    Parameters
    ----------
    attention, inputs
        The original module, and the mask and rotary embedding of a window.
    """

    def __init__(self, attention: Any, inputs: LayerInputs):
        self.attention, self.inputs = attention, inputs
        n, d = attention.k_proj.weight.shape[0], attention.head_dim
        weight = attention.o_proj.weight.unflatten(1, (n // d, -1, d))
        self.metric = torch.einsum("Dgma,Dgmb->gmab", weight, weight)
        self.keys = weight.new_zeros(n, n, dtype=torch.float64)  # sums of products in fp32
        self.first = torch.zeros_like(self.keys)
        self.queries = self.keys.new_zeros(n // d, d, d)

    def add(self, window: AttentionPass) -> None:
        """Add a window, with one query in `EVERY`."""
        projected = project(self.attention, window.attention_in)
        queries, keys, _ = projected
        queries = queries.unflatten(0, (len(keys), -1))[:, :, EVERY - 1 :: EVERY]
        costs = self.costs(window, projected)
        rows = keys.transpose(0, 1).flatten(1) * costs.sum((0, 1, 2)).sqrt()[:, None]
        self.first += torch.outer(rows[0], rows[0]).double()
        self.keys += (rows[1:].T @ rows[1:]).double()
        weighted = queries * costs.sum(3)[..., None]
        self.queries += torch.einsum("gmta,gmtb->gab", weighted, queries).double()

    def costs(self, window: AttentionPass, projected: Projected) -> Float[Tensor, "g m t_queries t"]:
        """``c_ij`` by kv head, query head of its group, query and key, relative to the residual stream's energy."""
        modelling = sys.modules[type(self.attention).__module__]
        attending = slice(EVERY - 1, None, EVERY)
        queries, keys, values = projected
        g, _, d = keys.shape
        rotated = modelling.apply_rotary_pos_emb(queries[None], keys[None], *self.inputs.position_embeddings)
        queries, keys = rotated[0][0, :, attending].unflatten(0, (g, -1)), rotated[1][0, :, None]
        maps = (queries @ keys.mT * self.attention.scaling + self.inputs.mask[0, :, attending]).softmax(-1)
        heads = window.heads_out[attending]
        scale = (head_scale(self.attention, heads).square() * window.weight[attending, None, None]).squeeze(2)
        outputs, values = heads.unflatten(1, (g, -1, d)).permute(1, 2, 0, 3), values[:, None]
        seen = outputs @ self.metric
        away = (values @ self.metric * values).sum(-1)[:, :, None] - 2 * seen @ values.mT
        away += (seen * outputs).sum(-1)[..., None]
        return maps.square() * away.clamp_min(0) * scale.T.unflatten(0, (g, -1))[..., None]

    def result(self) -> ScoreMoments:
        """The moments so far; only ratios within keys and within queries are meaningful."""
        return ScoreMoments(self.keys, self.first, self.queries)
