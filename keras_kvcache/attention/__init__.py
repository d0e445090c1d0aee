"""Pure functions of tensors: the mathematics of cached attention."""

from keras_kvcache.attention.attend import attend, attend_fused, attend_with_scores
from keras_kvcache.attention.masks import align_mask, view_masks
from keras_kvcache.attention.positions import normalize_index, token_positions
from keras_kvcache.attention.products import sequence_view
from keras_kvcache.attention.rotary import inverse_frequencies, rotate
from keras_kvcache.attention.scoring import Scoring
from keras_kvcache.attention.segments import Segment, View
from keras_kvcache.attention.splicing import splice

__all__ = [
    "Scoring",
    "Segment",
    "View",
    "align_mask",
    "attend",
    "attend_fused",
    "attend_with_scores",
    "normalize_index",
    "inverse_frequencies",
    "rotate",
    "sequence_view",
    "splice",
    "token_positions",
    "view_masks",
]
