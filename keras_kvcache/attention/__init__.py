"""Pure functions of tensors: the mathematics of cached attention."""

from keras_kvcache.attention.attend import attend, attend_fused, attend_with_scores
from keras_kvcache.attention.masks import align_mask, check_mask_shape, view_masks
from keras_kvcache.attention.positions import (
    as_int32,
    normalize_index,
    token_positions,
    write_slot,
)
from keras_kvcache.attention.products import (
    keys_of,
    sequence_view,
    sum_dtype,
    values_of,
)
from keras_kvcache.attention.quantize import (
    dequantize_int4_groups,
    pack_int4,
    quantize_int4,
    quantize_int4_groups,
    quantize_int8,
    rotation,
    unpack_int4,
)
from keras_kvcache.attention.ring import ring_positions, write_ring
from keras_kvcache.attention.rotary import inverse_frequencies, rotate
from keras_kvcache.attention.scoring import Scoring
from keras_kvcache.attention.segments import Segment, View, slots_of
from keras_kvcache.attention.splicing import splice
from keras_kvcache.attention.trigonometry import tanh

__all__ = [
    "Scoring",
    "Segment",
    "View",
    "align_mask",
    "as_int32",
    "attend",
    "attend_fused",
    "attend_with_scores",
    "normalize_index",
    "check_mask_shape",
    "dequantize_int4_groups",
    "inverse_frequencies",
    "keys_of",
    "pack_int4",
    "quantize_int4",
    "quantize_int4_groups",
    "quantize_int8",
    "ring_positions",
    "rotate",
    "rotation",
    "sequence_view",
    "slots_of",
    "splice",
    "sum_dtype",
    "tanh",
    "token_positions",
    "unpack_int4",
    "values_of",
    "view_masks",
    "write_ring",
    "write_slot",
]
