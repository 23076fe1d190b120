"""The reference mathematics against PyTorch's own attention and against loops over heads, as the papers write them."""

import math

import torch
import torch.nn.functional as F

from mea.ops import reference
from mea.ops.masks import attention_mask
from mea.ops.rope import to_complex

T, D = 63, 60
TERMS = 2 * D + 2 * T  # a score, its softmax, a read: the contractions on the way to one number


def heads(h: int, t: int = T, d: int = D) -> torch.Tensor:
    return torch.randn(2, t, h, d, dtype=torch.float64)


def test_attend_is_sdpa_with_groups_and_a_mask(agree):
    q, k, v = heads(6), heads(3), heads(3, d=2 * D)
    mask = attention_mask(T, window=20)
    by_torch = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask, enable_gqa=True)
    agree(reference.attend(q, k, v, mask), by_torch.transpose(1, 2), TERMS)


def test_hlc_adds_scaled_heads(agree):
    x, w = heads(3), torch.randn(3, 5, dtype=torch.float64)
    for g in range(5):
        agree(reference.hlc(x, w)[:, :, g], sum(w[c, g] * x[:, :, c] for c in range(3)), terms=3)


def test_frequency_hlc_adds_turned_and_scaled_pairs(agree):
    x, w = heads(3), torch.randn(D // 2, 3, 5, dtype=torch.complex128)
    mixed = to_complex(reference.frequency_hlc(x, w, rotary_dim=D - 20), D - 20)
    for g in range(5):
        expected = sum(w[:, c, g] * to_complex(x[:, :, c], D - 20) for c in range(3))
        agree(torch.view_as_real(mixed[:, :, g]), torch.view_as_real(expected), terms=6)


def test_frequency_hlc_with_real_equal_numbers_is_hlc(agree):
    x, w = heads(3), torch.randn(3, 5, dtype=torch.float64)
    agree(reference.frequency_hlc(x, w.expand(D // 2, 3, 5).to(torch.complex128)), reference.hlc(x, w), terms=3)


def test_head_norm_makes_every_head_of_unit_mean_square(agree):
    x, gain = heads(4), torch.randn(4, D, dtype=torch.float64)
    unit = reference.head_norm(x, eps=0.0)
    agree(unit.square().mean(-1), torch.ones(2, T, 4, dtype=torch.float64), terms=D)
    agree(reference.head_norm(x, gain), F.rms_norm(x, (D,), None, 1e-5) * gain, terms=D)


def test_mea_is_the_papers_formula_head_by_head(agree):
    q, k, v = heads(4), heads(2), heads(2)
    w_k, w_v = torch.randn(2, 2, 2, dtype=torch.float64)
    gain, mask = torch.randn(D, dtype=torch.float64), attention_mask(T)
    out = reference.mea(q, k, v, w_k, w_v, gain, mask)
    for i in range(4):
        g = i // 2
        key = sum(w_k[c, g] * k[:, :, c] for c in range(2))
        value = sum(w_v[c, g] * v[:, :, c] for c in range(2))
        logits = (q[:, :, i] @ key.mT / math.sqrt(D)).masked_fill(~mask[0], -math.inf)
        expected = F.rms_norm(logits.softmax(-1) @ value, (D,), gain, 1e-5)
        agree(out[:, :, i], expected, TERMS + D + 4)


def test_talking_heads_is_the_papers_formula_head_by_head(agree):
    q, k, v = heads(4), heads(2), heads(2)
    t_qk, t_v = torch.randn(2, 4, 4, dtype=torch.float64)
    mask = attention_mask(T)
    out = reference.talking_heads(q, k, v, t_qk, t_v, mask)
    logits = [q[:, :, j] @ k[:, :, j // 2].mT / math.sqrt(D) for j in range(4)]
    mixed = [sum(t_qk[i, j] * logits[j] for j in range(4)) for i in range(4)]
    maps = [x.masked_fill(~mask[0], -math.inf).softmax(-1) for x in mixed]
    for i in range(4):
        expected = sum(t_v[i, j] * maps[j] for j in range(4)) @ v[:, :, i // 2]
        agree(out[:, :, i], expected, TERMS + 8)


def test_differential_v1_is_the_papers_formula_pair_by_pair(agree):
    q, k, v = heads(8), heads(4), heads(4)
    mask, lam = attention_mask(T), 0.37
    out = reference.differential_v1(q, k, v, lam, mask)
    for m in range(4):
        g = m // 2  # pairs are grouped as heads are
        maps = [
            (q[:, :, 2 * m + j] @ k[:, :, 2 * g + j].mT / math.sqrt(D)).masked_fill(~mask[0], -math.inf).softmax(-1)
            for j in range(2)
        ]
        expected = (maps[0] - lam * maps[1]) @ torch.cat([v[:, :, 2 * g], v[:, :, 2 * g + 1]], dim=-1)
        agree(out[:, :, m], expected, TERMS + 2)


def test_differential_v2_subtracts_neighbours_of_one_group(agree):
    q, k, v = heads(8), heads(2), heads(2)
    gate = torch.rand(2, T, 4, dtype=torch.float64)
    plain = reference.attend(q, k, v)
    expected = plain[:, :, [0, 2, 4, 6]] - gate[..., None] * plain[:, :, [1, 3, 5, 7]]
    agree(reference.differential_v2(q, k, v, gate), expected, TERMS + 2)


def test_knocking_multiplies_every_head_by_the_same_matrix(agree):
    x, w = heads(3), torch.randn(D, D, dtype=torch.float64)
    for i in range(3):
        agree(reference.knock(x, w)[:, :, i], x[:, :, i] @ w, terms=D)


def test_interleaved_is_the_papers_algorithm_head_by_head(agree):
    """Four heads, three pseudo-heads of each: mixed, put in a row, attended causally and collapsed, in loops."""
    h, n, t = 4, 3, 7
    q, k, v = heads(h, t), heads(h, t), heads(h, t)
    a_q, a_k, a_v, r = (torch.randn(h, h, n, dtype=torch.float64) for _ in range(4))
    mixed = (reference.pseudo_heads(x, w) for x, w in ((q, a_q), (k, a_k), (v, a_v)))
    out = reference.interleaved(*mixed, r.permute(1, 2, 0), attention_mask(n * t))
    read = {}
    for i in range(h):
        rows = []
        for x, w in ((q, a_q), (k, a_k), (v, a_v)):
            pseudo = [sum(w[m, i, j] * x[:, :, m] for m in range(h)) for j in range(n)]
            rows.append(torch.stack([pseudo[j][:, token] for token in range(t) for j in range(n)], dim=1))
        later = torch.ones(n * t, n * t).triu(1).bool()
        maps = (rows[0] @ rows[1].mT / math.sqrt(D)).masked_fill(later, -math.inf).softmax(-1)
        read[i] = maps @ rows[2]
    for i in range(h):
        expected = sum(r[i, m, j] * read[m][:, j::n] for m in range(h) for j in range(n))
        agree(out[:, :, i], expected, terms=3 * h + 2 * D + 2 * n * t + h * n)


def test_a_gate_is_a_factor_of_every_channel(agree):
    out, logits = heads(4), heads(4)
    for i in range(4):
        agree(reference.gated(out, logits)[:, :, i], out[:, :, i] / (1 + torch.exp(-logits[:, :, i])), terms=4)


def test_differential_lambda_starts_at_its_initial_value(agree):
    zero = torch.zeros(8, dtype=torch.float64)
    lam = reference.differential_lambda(zero, zero, zero, zero, layer=3)
    agree(lam, torch.tensor(0.8 - 0.6 * math.exp(-0.9), dtype=torch.float64), terms=2)
