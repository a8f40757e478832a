"""The library's scaled-dot-product attention, and the same for packed rows (packing.py), registered under one name.

Its own module because the library is imported with it.
"""

from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chainfed_engine.model.families.base import ATTENTION
from chainfed_engine.model.packing import PackedMask


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """query [B, heads, T, d] -> [B, T, heads, d]; of packed rows, which are one sequence [1, heads, N, d], each of the
    batch's sequences by itself."""
    if not isinstance(attention_mask, PackedMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    packing = attention_mask.packing
    query, key, value = (packing.unpack(rows.transpose(1, 2)).transpose(1, 2) for rows in (query, key, value))
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask.mask, **options)
    return packing.pack(out), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
