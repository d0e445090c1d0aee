"""Pure functions of tensors: the mathematics of cached attention."""

from keras_kvcache.ops.attention import attend, attend_fused, attend_with_scores
from keras_kvcache.ops.known import known_value
from keras_kvcache.ops.masks import align_mask, check_mask_shape, view_masks
from keras_kvcache.ops.platform import preferred_dtype
from keras_kvcache.ops.positions import check_index, token_positions, write_slot
from keras_kvcache.ops.products import (
    dense_segment,
    head_major_segment,
    sequence_view,
)
from keras_kvcache.ops.rotary import inverse_frequencies, rotate
from keras_kvcache.ops.splice import splice
from keras_kvcache.ops.view import Segment, View

__all__ = [
    "Segment",
    "View",
    "align_mask",
    "attend",
    "attend_fused",
    "attend_with_scores",
    "check_index",
    "check_mask_shape",
    "dense_segment",
    "head_major_segment",
    "inverse_frequencies",
    "known_value",
    "preferred_dtype",
    "rotate",
    "sequence_view",
    "splice",
    "token_positions",
    "view_masks",
    "write_slot",
]
