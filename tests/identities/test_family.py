"""Why MHA, GQA, MQA, talking-heads, differential attention and MEA are neighbours: one identity a test.

Exact arithmetic is claimed, so everything runs in fp64 and only rounding is allowed. Shapes are drawn at random.
"""

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mea.attention import (
    GatedAttention,
    GroupedQueryAttention,
    InterleavedHeadAttention,
    ModifiedTalkingHeadsAttention,
    MultiheadExplicitAttention,
)
from mea.attention.mixing import FrequencyMixing, HeadMixing
from mea.ops import reference as ref
from mea.ops.masks import attention_mask
from mea.ops.rope import rotary, rotate


@dataclass(frozen=True)
class Shape:
    """Dimensions of an example, and random tensors that have them."""

    b: int
    t: int
    group: int
    h_kv: int
    h_c: int
    pairs: int

    @property
    def h(self) -> int:
        return self.group * self.h_kv

    @property
    def d(self) -> int:
        return 2 * self.pairs

    @property
    def width(self) -> int:
        return self.h * self.d

    @property
    def terms(self) -> int:
        """Contractions on the way to an output: projections, mixings, a score, a softmax, a read, a norm."""
        return 2 * self.width + 4 * self.h + 3 * self.d + 2 * self.t

    @property
    def mask(self) -> Tensor:
        return attention_mask(self.t)

    def heads(self, n: int) -> Tensor:
        return torch.randn(self.b, self.t, n, self.d, dtype=torch.float64)

    def qkv(self, h_kv: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.heads(self.h), self.heads(h_kv), self.heads(h_kv)


@st.composite
def shapes(draw) -> Shape:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    return Shape(*(draw(st.integers(1, most)) for most in (2, 12, 3, 4, 4, 9)))


def matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64) / rows**0.5


example = settings(max_examples=20, deadline=None)


@example
@given(shape=shapes())
def test_gqa_is_mha_with_repeated_heads(shape, agree):
    q, k, v = shape.qkv(shape.h_kv)
    repeated = (x.repeat_interleave(shape.group, dim=2) for x in (k, v))
    agree(ref.attend(q, k, v, shape.mask), ref.attend(q, *repeated, shape.mask), shape.terms)


@example
@given(shape=shapes())
def test_mixing_by_the_identity_without_norm_is_gqa(shape, agree):
    q, k, v = shape.qkv(shape.h_kv)
    eye = torch.eye(shape.h_kv, dtype=torch.float64)
    mixed = ref.attend(q, ref.hlc(k, eye), ref.hlc(v, eye), shape.mask)
    agree(mixed, ref.attend(q, k, v, shape.mask), shape.terms)


@example
@given(shape=shapes())
def test_mixing_one_component_into_all_heads_is_mqa(shape, agree):
    q, k, v = shape.qkv(1)
    copy = torch.ones(1, shape.h_kv, dtype=torch.float64)
    mixed = ref.attend(q, ref.hlc(k, copy), ref.hlc(v, copy), shape.mask)
    agree(mixed, ref.attend(q, k, v, shape.mask), shape.terms)


@example
@given(shape=shapes())
def test_scalar_mixing_commutes_with_rope(shape, agree):
    x, w = shape.heads(shape.h_c), matrix(shape.h_c, shape.h_kv)
    turn = rotary(torch.arange(shape.t)[None], torch.rand(shape.pairs, dtype=torch.float64))
    agree(rotate(ref.hlc(x, w), turn), ref.hlc(rotate(x, turn), w), shape.terms)


@example
@given(shape=shapes(), still=st.integers(0, 3))
def test_complex_mixing_per_frequency_commutes_with_rope(shape, still, agree):
    moving = max(shape.pairs - still, 0)
    x, w = shape.heads(shape.h_c), torch.randn(shape.pairs, shape.h_c, shape.h_kv, dtype=torch.complex128)
    turn = rotary(torch.arange(shape.t)[None], torch.rand(moving, dtype=torch.float64))
    mixed_first = rotate(ref.frequency_hlc(x, w, 2 * moving), turn)
    agree(mixed_first, ref.frequency_hlc(rotate(x, turn), w, 2 * moving), shape.terms)


def test_a_mixing_that_conjugates_does_not_commute_with_rope():
    """Complex-linear is as general as it gets: conjugation is real-linear, over heads, per frequency, and fails."""
    x = torch.randn(1, 5, 1, 2, dtype=torch.float64)
    turn = rotary(torch.arange(5)[None], torch.ones(1, dtype=torch.float64))
    conjugate = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert not torch.allclose(rotate(x * conjugate, turn), rotate(x, turn) * conjugate)


@example
@given(shape=shapes(), norm=st.booleans(), frequency=st.booleans(), qk_norm=st.booleans())
def test_a_square_mixing_folds_into_the_projections(shape, norm, frequency, qk_norm, agree):
    """Without norm square MEA is grouped attention, with it grouped attention and a head norm; no more at inference."""
    module = MultiheadExplicitAttention(
        shape.width,
        shape.h,
        shape.h_kv,
        head_norm="shared_gain" if norm else "off",
        key_mixing="frequency" if frequency else "scalar",
        init="scaled_random",
        qk_norm=qk_norm,
    ).double()
    x = torch.randn(shape.b, shape.t, shape.width, dtype=torch.float64)
    agree(module.folded()(x), module(x), shape.terms)


@example
@given(shape=shapes(), frequency=st.booleans())
def test_reading_components_absorbed_is_reading_rebuilt_heads(shape, frequency, agree):
    q, k, v = shape.heads(shape.h), shape.heads(shape.h_c), shape.heads(shape.h_c)
    keys = HeadMixing(shape.h_c, shape.h_kv, "scaled_random").double()
    values = HeadMixing(shape.h_c, shape.h_kv, "scaled_random").double()
    if frequency:
        keys = FrequencyMixing(shape.h_c, shape.h_kv, shape.d, shape.d, "scaled_random").double()
    rebuilt = ref.attend(q, keys(k), values(v), shape.mask)
    latent_k, latent_v = k.flatten(2)[:, :, None], v.flatten(2)[:, :, None]
    one_head = ref.attend(keys.absorb(q), latent_k, latent_v, shape.mask, scale=shape.d**-0.5)
    agree(values.unmix(one_head), rebuilt, shape.terms)


@example
@given(shape=shapes())
def test_modified_talking_heads_is_mea_without_norm(shape, agree):
    q, k, v = shape.qkv(shape.h_kv)
    t_qk, t_v = matrix(shape.h_kv, shape.h_kv), matrix(shape.h_kv, shape.h_kv)
    modified = ref.modified_talking_heads(q, k, v, t_qk, t_v, shape.mask)
    normed = ref.mea(q, k, v, t_qk.mT, t_v.mT, mask=shape.mask)
    agree(ref.head_norm(modified), normed, shape.terms)

    module = ModifiedTalkingHeadsAttention(shape.width, shape.h, shape.h_kv, init="scaled_random")
    twin = MultiheadExplicitAttention(shape.width, shape.h, shape.h_kv, head_norm="off")
    twin.load_state_dict(module.state_dict())
    x = torch.randn(shape.b, shape.t, shape.width)
    agree(module(x), twin(x), shape.terms)


@example
@given(shape=shapes())
def test_talking_heads_with_diagonal_matrices_is_the_modified_one(shape, agree):
    q, k, v = shape.qkv(shape.h)
    t_qk, t_v = (torch.randn(shape.h, dtype=torch.float64).diag() for _ in range(2))
    original = ref.talking_heads(q, k, v, t_qk, t_v, shape.mask)
    agree(original, ref.modified_talking_heads(q, k, v, t_qk, t_v, shape.mask), shape.terms)


@example
@given(shape=shapes())
def test_value_sides_agree_after_one_shared_output_projection_with_t_transposed(shape, agree):
    """Once all heads are summed through the same W_O it is immaterial which of map and value was mixed."""
    q, k, v = shape.qkv(shape.h)
    t_v, eye = matrix(shape.h, shape.h), torch.eye(shape.h, dtype=torch.float64)
    w_o = matrix(shape.d, shape.width)
    original = ref.talking_heads(q, k, v, eye, t_v, shape.mask).sum(dim=2) @ w_o
    modified = ref.modified_talking_heads(q, k, v, eye, t_v.mT, shape.mask).sum(dim=2) @ w_o
    agree(original, modified, shape.terms)


def test_original_talking_heads_is_richer_than_the_modified_one():
    """Against the paper's Appendix B: the score and value maps of an original head have rank min(h d, D), not d.

    The maps are seen through the functions themselves: unit vectors as tokens make the scores the bilinear form.
    """
    h, d, width = 4, 3, 10
    w_q, w_k = torch.randn(2, width, h * d, dtype=torch.float64)
    t = matrix(h, h)
    q, k = (w.view(1, width, h, d) for w in (w_q, w_k))
    original = torch.einsum("ij,bjts->bits", t, ref.scores(q, k, scale=1.0))
    modified = ref.scores(q, ref.hlc(k, t.mT), scale=1.0)
    assert torch.linalg.matrix_rank(original[0]).tolist() == [min(h * d, width)] * h
    assert torch.linalg.matrix_rank(modified[0]).tolist() == [d] * h

    # The value map of head i, as its output depends on its own map A_i, runs through every W_Vi W_Oj with T_ji != 0.
    w_v, w_o = torch.randn(width, h, d, dtype=torch.float64), torch.randn(h, d, width, dtype=torch.float64)
    own_map = torch.einsum("ji,xjd,jdy->ixy", t, w_v, w_o)
    mixed_value = torch.einsum("ij,xjd,idy->ixy", t, w_v, w_o)
    assert torch.linalg.matrix_rank(own_map).tolist() == [min(h * d, width)] * h
    assert torch.linalg.matrix_rank(mixed_value).tolist() == [d] * h


@example
@given(shape=shapes(), lam=st.floats(-2, 2))
def test_differential_attention_is_a_talking_heads_attention(shape, lam, agree):
    """The matrix of the paper's Appendix A: rows 2 m and 2 m + 1 are 1 at column 2 m and -lambda at column 2 m + 1."""
    h = 2 * shape.h
    q, k, v = shape.heads(h), shape.heads(h), shape.heads(h)
    block = torch.tensor([[1.0, -lam], [1.0, -lam]], dtype=torch.float64)
    t_v = torch.block_diag(*[block] * shape.h)
    talking = ref.talking_heads(q, k, v, torch.eye(h, dtype=torch.float64), t_v, shape.mask)
    in_pairs = talking.unflatten(2, (-1, 2)).flatten(3)
    agree(ref.differential_v1(q, k, v, lam, shape.mask), in_pairs, shape.terms)


@example
@given(shape=shapes())
def test_differential_attention_with_lambda_zero_is_attention_of_half_the_maps(shape, agree):
    q, k, v = (shape.heads(2 * shape.h) for _ in range(3))
    double = v.unflatten(2, (-1, 2)).flatten(3)
    expected = ref.attend(q[:, :, 0::2], k[:, :, 0::2], double, shape.mask)
    agree(ref.differential_v1(q, k, v, 0.0, shape.mask), expected, shape.terms)


@example
@given(shape=shapes())
def test_second_differential_attention_with_closed_gates_is_gqa(shape, agree):
    q, k, v = shape.heads(2 * shape.h), shape.heads(shape.h_kv), shape.heads(shape.h_kv)
    closed = torch.zeros(shape.b, shape.t, shape.h, dtype=torch.float64)
    expected = ref.attend(q[:, :, 0::2], k, v, shape.mask)
    agree(ref.differential_v2(q, k, v, closed, shape.mask), expected, shape.terms)


@example
@given(shape=shapes())
def test_a_gate_of_zeros_halves_grouped_attention_and_an_open_one_leaves_it(shape, agree):
    """At ``W_gate = 0`` sigma is 1/2, so that twice the output projection makes it grouped attention."""
    module = GatedAttention(shape.width, shape.h, shape.h_kv).double()
    plain = GroupedQueryAttention(shape.width, shape.h, shape.h_kv).double()
    plain.load_state_dict(module.state_dict(), strict=False)
    module.gate_proj.weight.data.zero_()
    x = torch.randn(shape.b, shape.t, shape.width, dtype=torch.float64)
    agree(2 * module(x), plain(x), shape.terms)

    heads = shape.heads(shape.h)
    agree(ref.gated(heads, torch.full_like(heads, 50.0)), heads, terms=1)  # 1 - sigma(50) is below eps


@example
@given(shape=shapes())
def test_mea_and_knocking_heads_are_blocks_of_one_matrix_over_all_heads(shape, agree):
    """Over concatenated heads HLC is ``W kron I_d``, knocking ``I_h kron T``, and both in either order ``W kron T``.

    So MEA mixes heads by scalars, which are the same for all channels, and knocking mixes channels, the same for all
    heads: all that both can do are multiples of the identity.
    """
    x, w, t = shape.heads(shape.h_c), matrix(shape.h_c, shape.h_kv), matrix(shape.d, shape.d)
    eye = torch.eye(shape.h_c, dtype=torch.float64), torch.eye(shape.d, dtype=torch.float64)
    agree(ref.hlc(x, w).flatten(2), x.flatten(2) @ torch.kron(w, eye[1]), shape.terms)
    agree(ref.knock(x, t).flatten(2), x.flatten(2) @ torch.kron(eye[0], t), shape.terms)
    both = x.flatten(2) @ torch.kron(w, t)
    agree(ref.knock(ref.hlc(x, w), t).flatten(2), both, shape.terms)
    agree(ref.hlc(ref.knock(x, t), w).flatten(2), both, shape.terms)


@example
@given(shape=shapes())
def test_knocking_of_values_may_follow_attention(shape, agree):
    """So that it folds into the output projection as well as into ``W_V``."""
    q, k, v = shape.qkv(shape.h_kv)
    t = matrix(shape.d, shape.d)
    agree(ref.attend(q, k, ref.knock(v, t), shape.mask), ref.knock(ref.attend(q, k, v, shape.mask), t), shape.terms)


def test_knocking_does_not_commute_with_rope():
    """Unlike scalar mixing of heads: it stands before RoPE, where it folds into the projections."""
    x, t = torch.randn(1, 5, 2, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    turn = rotary(torch.arange(5)[None], torch.rand(2, dtype=torch.float64))
    assert not torch.allclose(rotate(ref.knock(x, t), turn), ref.knock(rotate(x, turn), t))


@example
@given(shape=shapes(), n=st.integers(1, 3))
def test_copies_of_heads_collapsed_to_the_last_are_mha(shape, n, agree):
    """The paper's proof that interleaved heads contain MHA, without positions: the last copy sees each key n times.

    An earlier copy sees fewer of its own token, because the order of copies is causal: the paper's choice of the first
    needs attention without that order.
    """
    q, k, v = shape.qkv(shape.h_kv)
    pseudo = (x[:, :, None].expand(-1, -1, n, -1, -1) for x in (q, k, v))
    last = torch.zeros(shape.h, n, shape.h, dtype=torch.float64)
    last[:, -1] = torch.eye(shape.h)
    out = ref.interleaved(*pseudo, last, attention_mask(n * shape.t))
    agree(out, ref.attend(q, k, v, shape.mask), n * shape.terms)


@example
@given(shape=shapes())
def test_interleaved_heads_with_one_pseudo_head_are_mea_with_mixed_queries_and_outputs(shape, agree):
    """With the identity for queries and outputs it is MEA without its norm, RoPE included."""
    module = InterleavedHeadAttention(
        shape.width, shape.h, shape.h_kv, num_pseudo_heads=1, init="scaled_random"
    ).double()
    with torch.no_grad():
        for mixing in (module.query_mixing, module.collapse):
            mixing.weight.copy_(torch.eye(shape.h))
    mea = ModifiedTalkingHeadsAttention(shape.width, shape.h, shape.h_kv).double()
    mea.load_state_dict(module.state_dict(), strict=False)
    x = torch.randn(shape.b, shape.t, shape.width, dtype=torch.float64)
    agree(module(x), mea(x), shape.terms)


@example
@given(shape=shapes(), frequency=st.booleans(), qk_norm=st.booleans())
def test_shared_components_are_mea_with_equal_projections_of_keys_and_values(shape, frequency, qk_norm, agree):
    """Fewer than key/value heads, so that the norm of keys stands before the mixing in both."""
    options = {
        "num_component_heads": min(shape.h_c, max(1, shape.h_kv - 1)),
        "key_mixing": "frequency" if frequency else "scalar",
        "init": "scaled_random",
        "qk_norm": qk_norm and shape.h_kv > 1,
    }
    module = MultiheadExplicitAttention(shape.width, shape.h, shape.h_kv, share_components=True, **options).double()
    twin = MultiheadExplicitAttention(shape.width, shape.h, shape.h_kv, **options).double()
    twin.load_state_dict({**module.state_dict(), "v_proj.weight": module.k_proj.weight})
    x = torch.randn(shape.b, shape.t, shape.width, dtype=torch.float64)
    agree(module(x), twin(x), shape.terms)


@example
@given(shape=shapes())
def test_attention_to_components_themselves_is_the_oracle_with_one_tensor_for_both(shape, agree):
    """Identity mixings without norm: grouped attention whose values are its keys before RoPE."""
    module = MultiheadExplicitAttention(
        shape.width, shape.h, shape.h_kv, share_components=True, head_norm="off", rope=None
    ).double()
    x = torch.randn(shape.b, shape.t, shape.width, dtype=torch.float64)
    q, c = (proj(x).unflatten(-1, (-1, shape.d)) for proj in (module.q_proj, module.k_proj))
    agree(module(x), module.o_proj(ref.attend(q, c, c, shape.mask).flatten(2)), shape.terms)
