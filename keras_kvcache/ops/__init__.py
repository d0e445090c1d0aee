"""Pure functions of tensors: the mathematics of cached attention."""

from keras_kvcache.ops.attention import attend, attend_fused, attend_with_scores
from keras_kvcache.ops.channel import NO_CHANNEL, Channel, announce, can_announce
from keras_kvcache.ops.known import is_integer, known_integers, known_value
from keras_kvcache.ops.masks import align_mask, check_mask_shape, view_masks
from keras_kvcache.ops.platform import (
    compiler_options,
    current_platform,
    preferred_dtype,
)
from keras_kvcache.ops.positions import (
    as_int32,
    check_index,
    token_positions,
    write_slot,
)
from keras_kvcache.ops.products import (
    keys_of,
    sequence_view,
    sum_dtype,
    values_of,
)
from keras_kvcache.ops.quantize import (
    dequantize_int4_groups,
    pack_int4,
    quantize_int4,
    quantize_int4_groups,
    quantize_int8,
    rotation,
    unpack_int4,
)
from keras_kvcache.ops.ring import ring_positions, write_ring
from keras_kvcache.ops.rotary import inverse_frequencies, rotate
from keras_kvcache.ops.scoring import Scoring
from keras_kvcache.ops.sharding import distribute
from keras_kvcache.ops.splice import splice
from keras_kvcache.ops.tracing import can_trace, trace
from keras_kvcache.ops.trigonometry import tanh
from keras_kvcache.ops.view import Segment, View, slots_of, start_of_slice

__all__ = [
    "NO_CHANNEL",
    "Channel",
    "Scoring",
    "Segment",
    "View",
    "align_mask",
    "announce",
    "as_int32",
    "attend",
    "attend_fused",
    "attend_with_scores",
    "can_announce",
    "can_trace",
    "check_index",
    "check_mask_shape",
    "compiler_options",
    "current_platform",
    "dequantize_int4_groups",
    "distribute",
    "inverse_frequencies",
    "is_integer",
    "keys_of",
    "known_integers",
    "known_value",
    "pack_int4",
    "preferred_dtype",
    "quantize_int4",
    "quantize_int4_groups",
    "quantize_int8",
    "ring_positions",
    "rotate",
    "rotation",
    "sequence_view",
    "slots_of",
    "splice",
    "start_of_slice",
    "sum_dtype",
    "tanh",
    "token_positions",
    "trace",
    "unpack_int4",
    "values_of",
    "view_masks",
    "write_ring",
    "write_slot",
]
