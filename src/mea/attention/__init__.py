"""One ``nn.Module`` per attention method, one file each, one signature: used alone, or by name with `by_name`."""

from mea.attention.base import Attention, KVCache
from mea.attention.differential import DifferentialAttention, DifferentialAttentionV2
from mea.attention.gated import GatedAttention
from mea.attention.gqa import GroupedQueryAttention
from mea.attention.interleaved_heads import InterleavedHeadAttention
from mea.attention.knocking_heads import KnockingHeadsAttention
from mea.attention.mea import MultiheadExplicitAttention
from mea.attention.talking_heads import ModifiedTalkingHeadsAttention, TalkingHeadsAttention
from mea.names import did_you_mean

__all__ = [
    "METHODS",
    "Attention",
    "DifferentialAttention",
    "DifferentialAttentionV2",
    "GatedAttention",
    "GroupedQueryAttention",
    "InterleavedHeadAttention",
    "KVCache",
    "KnockingHeadsAttention",
    "ModifiedTalkingHeadsAttention",
    "MultiheadExplicitAttention",
    "TalkingHeadsAttention",
    "by_name",
]

METHODS: dict[str, type[Attention]] = {
    "gqa": GroupedQueryAttention,
    "mea": MultiheadExplicitAttention,
    "differential_v1": DifferentialAttention,
    "differential_v2": DifferentialAttentionV2,
    "talking_heads": TalkingHeadsAttention,
    "modified_talking_heads": ModifiedTalkingHeadsAttention,
    "gated": GatedAttention,
    "knocking_heads": KnockingHeadsAttention,
    "interleaved_heads": InterleavedHeadAttention,
}


def by_name(name: str) -> type[Attention]:
    """The attention class called `name` in a configuration.

    Raises
    ------
    ValueError
        There is no such method; the message suggests a similar name.
    """
    if name not in METHODS:
        hint = did_you_mean(name, METHODS)
        raise ValueError(f"no attention method is called {name!r}: there are {', '.join(METHODS)}{hint}")
    return METHODS[name]
