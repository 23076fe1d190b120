"""The uncompressed model in its fastest form: what a compressed one has to beat.

With grouped queries, PyTorch's kernels on a processor are several times slower when they expand the kv heads than
when each kv head's queries are the rows of one matrix, for one new token. transformers does the former.
"""

from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "packed"


def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Stock attention, but for one new token each kv head's queries are the rows of one matrix."""
    b, h, q, d = query.shape
    if q > 1 or attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    packed = query.reshape(b, key.shape[1], -1, d)
    output = scaled_dot_product_attention(packed, key, value, scale=options.get("scaling"))
    return output.view(b, 1, h, d), None


def use_packed_decode(model: Any) -> Any:
    """Set a stock model to decode by `packed_attention`, and return it."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return model
