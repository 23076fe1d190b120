"""Every attention method with the options that change its mathematics, and the reference that each must match."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from mea.attention import (
    Attention,
    DifferentialAttention,
    DifferentialAttentionV2,
    GatedAttention,
    GroupedQueryAttention,
    InterleavedHeadAttention,
    KnockingHeadsAttention,
    ModifiedTalkingHeadsAttention,
    MultiheadExplicitAttention,
    TalkingHeadsAttention,
)
from mea.attention.mixing import FeatureMixing, FrequencyMixing, HeadMixing, HeadNorm
from mea.ops import reference
from mea.ops.masks import attention_mask
from mea.ops.rope import RopeConfig, frequencies, rotary, rotate

HIDDEN = 48


@dataclass(frozen=True)
class Case:
    """A module to build: its class and its options. `heads` is (query heads, key/value heads)."""

    cls: type[Attention]
    heads: tuple[int, int] = (4, 2)
    options: dict = field(default_factory=dict)

    def build(self, head_dim: int = 12, dtype: torch.dtype = torch.float64, **more) -> Attention:
        """Build it with every parameter away from its initial value, so that none can be missed."""
        module = self.cls(HIDDEN, *self.heads, head_dim=head_dim, **{**self.options, **more})
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return module.to(dtype)


MEA = MultiheadExplicitAttention
CASES = {
    "mha": Case(GroupedQueryAttention, (3, 3)),
    "gqa": Case(GroupedQueryAttention),
    "mqa": Case(GroupedQueryAttention, (4, 1)),
    "gqa-bias-qk_norm": Case(GroupedQueryAttention, options={"bias": True, "qk_norm": True}),
    "gqa-norm": Case(GroupedQueryAttention, options={"head_norm": "shared_gain"}),
    "gqa-nope": Case(GroupedQueryAttention, options={"rope": None}),
    "gqa-partial-linear": Case(
        GroupedQueryAttention, options={"rope": RopeConfig(fraction=0.5, scaling="linear", factor=4.0)}
    ),
    "mea": Case(MEA),
    "mea-keys-no_gain": Case(MEA, options={"mix": "keys", "head_norm": "no_gain"}),
    "mea-values-per_head": Case(MEA, options={"mix": "values", "head_norm": "per_head_gain"}),
    "mea-neither": Case(MEA, options={"mix": "neither"}),
    "mea-folding-bias": Case(MEA, options={"fold": "always", "bias": True, "init": "scaled_random"}),
    "mea-qk_norm": Case(MEA, options={"qk_norm": True, "init": "orthogonal"}),
    "mea-frequency": Case(MEA, options={"key_mixing": "frequency", "init": "identity_noise"}),
    "mea-frequency-folding-partial": Case(
        MEA, options={"key_mixing": "frequency", "fold": "always", "rope": RopeConfig(fraction=0.5), "bias": True}
    ),
    "mea-fewer": Case(MEA, (6, 3), options={"num_component_heads": 2}),
    "mea-fewer-folding": Case(MEA, (6, 3), options={"num_component_heads": 2, "fold": "always", "bias": True}),
    "mea-fewer-qk_norm": Case(MEA, (6, 3), options={"num_component_heads": 2, "qk_norm": True}),
    "mea-fewer-keys": Case(MEA, (6, 3), options={"num_component_heads": 2, "mix": "keys", "qk_norm": True}),
    "mea-fewer-values": Case(MEA, (6, 3), options={"num_component_heads": 1, "mix": "values"}),
    "mea-fewer-frequency": Case(
        MEA, (6, 3), options={"num_component_heads": 2, "key_mixing": "frequency", "init": "orthogonal"}
    ),
    "mea-shared": Case(MEA, options={"share_components": True, "init": "orthogonal"}),
    "mea-shared-fewer-bias-qk_norm": Case(
        MEA, (6, 3), options={"share_components": True, "num_component_heads": 2, "bias": True, "qk_norm": True}
    ),
    "mea-shared-frequency-partial": Case(
        MEA, options={"share_components": True, "key_mixing": "frequency", "rope": RopeConfig(fraction=0.5)}
    ),
    "mea-shared-nope": Case(MEA, options={"share_components": True, "rope": None}),
    "differential_v1": Case(DifferentialAttention, (8, 4), options={"layer_index": 2}),
    "differential_v1-mha": Case(DifferentialAttention, (4, 4), options={"qk_norm": True}),
    "differential_v2": Case(DifferentialAttentionV2),
    "talking_heads": Case(TalkingHeadsAttention, options={"init": "orthogonal"}),
    "modified_talking_heads": Case(ModifiedTalkingHeadsAttention, options={"init": "orthogonal"}),
    "gated": Case(GatedAttention),
    "gated-bias-qk_norm": Case(GatedAttention, options={"bias": True, "qk_norm": True}),
    "interleaved_heads": Case(InterleavedHeadAttention),
    "interleaved_heads-mha-partial": Case(
        InterleavedHeadAttention, (3, 3), {"num_pseudo_heads": 3, "rope": RopeConfig(fraction=0.5), "bias": True}
    ),
    "interleaved_heads-nope-qk_norm": Case(
        InterleavedHeadAttention, options={"rope": None, "qk_norm": True, "init": "orthogonal"}
    ),
    "knocking_heads": Case(KnockingHeadsAttention),
    "knocking_heads-values-bias": Case(KnockingHeadsAttention, options={"on": "v", "bias": True}),
    "knocking_heads-scores-qk_norm": Case(KnockingHeadsAttention, options={"on": "qk", "qk_norm": True}),
}


@pytest.fixture(scope="session")
def cases() -> dict[str, Case]:
    return CASES


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """To compile takes seconds: by default one case of each method."""
    for item in items:
        if item.path.name == "test_compiled.py" and "-" in item.name:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def rms(norm: nn.Module, x: Tensor) -> Tensor:
    return reference.head_norm(x, norm.weight, norm.eps) if isinstance(norm, HeadNorm) else x


def mix(mixing: nn.Module | None, x: Tensor) -> Tensor:
    if isinstance(mixing, FrequencyMixing):
        wide = torch.promote_types(x.dtype, torch.float32)  # there is no complex bf16
        weight = torch.view_as_complex(mixing.weight.to(wide))
        return reference.frequency_hlc(x.to(wide), weight, mixing.rotary_dim).to(x.dtype)
    if isinstance(mixing, FeatureMixing):
        return reference.knock(x, mixing.weight)
    return reference.hlc(x, mixing.weight) if isinstance(mixing, HeadMixing) else x


def by_reference(m: Attention, x: Tensor, mask: Tensor) -> Tensor:
    """What module `m` must compute, in the functions of `mea.ops.reference` and nothing fused, folded or cached."""
    projections = m.q_proj, m.k_proj, getattr(m, "v_proj", m.k_proj)
    q, k, v = (proj(x).unflatten(-1, (-1, m.head_dim)) for proj in projections)
    if isinstance(m, MultiheadExplicitAttention):
        k = mix(m.key_mixing, rms(m.k_norm, k)) if m.compressed else rms(m.k_norm, mix(m.key_mixing, k))
    elif isinstance(m, KnockingHeadsAttention):
        q, k, v = mix(m.query_mixing, q), rms(m.k_norm, mix(m.key_mixing, k)), mix(m.value_mixing, v)
    else:
        k = rms(m.k_norm, k)
    q = rms(m.q_norm, q)
    n = 1
    if isinstance(m, InterleavedHeadAttention):
        n = m.num_pseudo_heads
        q, k, v = (
            reference.pseudo_heads(y, mixing.weight.unflatten(1, (-1, n))).flatten(1, 2)
            for y, mixing in ((q, m.query_mixing), (k, m.key_mixing), (v, m.value_mixing))
        )
        mask = mask.repeat_interleave(n, -1).repeat_interleave(n, -2) & attention_mask(n * x.shape[1], causal=m.causal)
    if m.rope is not None:
        turn = rotary(torch.arange(n * x.shape[1])[None], frequencies(m.head_dim, m.rope).to(x.dtype))
        q, k = rotate(q, turn), rotate(k, turn)
    match m:
        case InterleavedHeadAttention():
            q, k, v = (y.unflatten(1, (-1, n)) for y in (q, k, v))
            out = reference.interleaved(q, k, v, m.collapse.weight.unflatten(0, (-1, n)), mask)
        case MultiheadExplicitAttention():
            out = rms(m.head_norm, reference.attend(q, k, mix(m.value_mixing, v), mask))
        case DifferentialAttention():
            out = reference.differential_v1(q, k, v, m.lam().to(x.dtype), mask)
            out = rms(m.head_norm, out) * (1 - reference.differential_lambda_init(m.layer_index))
        case DifferentialAttentionV2():
            out = reference.differential_v2(q, k, v, m.lambda_proj(x).sigmoid(), mask)
        case TalkingHeadsAttention():
            out = reference.talking_heads(q, k, v, m.score_mixing.weight.mT, m.map_mixing.weight.mT, mask)
        case GatedAttention():
            logits = m.gate_proj(x).unflatten(-1, (-1, m.head_dim))
            out = reference.gated(reference.attend(q, k, v, mask), logits)
        case KnockingHeadsAttention():
            out = reference.attend(q, k, v, mask)
        case GroupedQueryAttention():
            out = rms(m.head_norm, reference.attend(q, k, v, mask))
        case _:
            raise AssertionError(f"no reference for {type(m).__name__}")
    return m.o_proj(out.flatten(2))


@pytest.fixture(scope="session")
def oracle() -> Callable[[Attention, Tensor, Tensor], Tensor]:
    return by_reference
