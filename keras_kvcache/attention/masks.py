"""Attention masks, made from positions alone.

A mask is boolean, `True` where a query may attend a slot, and has the shape
`(B, N, T, S)` in which `B`, `N` and `T` may be 1.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_kvcache.attention.positions import token_positions
from keras_kvcache.attention.segments import Segment, View
from keras_kvcache.runtime.concrete import concrete_value


def position_mask(
    query_positions: Any,
    segment: Segment,
    *,
    fill: Any = None,
    causal: bool = False,
    sliding_window: int | None = None,
    sinks: int = 0,
) -> Any:
    """Computes from positions which slots of a segment each query may attend.

    Args:
        query_positions: int32 `(1 | B, T)`.
        segment: A `Segment`; slots without a position are hidden.
        fill: int32 `(1 | B,)`; slots at or past it are empty. `None`: all full.
        causal: Whether later positions are hidden.
        sliding_window: `W`: a query sees positions less than `W` away from its
            own, on either side (as `keras.layers.MultiHeadAttention` has it).
            `None` for no window.
        sinks: How many of the first positions no window hides.

    Returns:
        A boolean mask `(1 | B, 1, 1 | T, n)`, or `None` if nothing is hidden.
    """
    query = query_positions[:, None, :, None]
    slot = segment.positions[:, None, None, :]
    rules = []
    if fill is not None or segment.first_position is None:
        rules.append(slot >= 0)
    if fill is not None:
        rules.append(slot < fill[:, None, None, None])
    if causal:
        rules.append(slot <= query)
    if sliding_window is not None:
        near = ops.abs(query - slot) < sliding_window
        rules.append(ops.logical_or(near, slot < sinks) if sinks else near)
    return _all_of(rules)


def mask_of_positions(attention_mask: Any, segment: Segment, first: int) -> Any:
    """Gathers a user's mask over positions for the slots of a segment.

    Args:
        attention_mask: Boolean with four axes, the last one `S` positions or 1.
        segment: A `Segment`.
        first: Number of slots in the segments before it: the position of its first
            slot if all slots are in the order of positions.

    Returns:
        A boolean mask with `n` or 1 on the last axis; slots at positions past the
        mask's end are hidden.
    """
    size = attention_mask.shape[-1]
    if size == 1:
        return attention_mask
    if segment.first_position is not None:
        return attention_mask[..., first : first + ops.shape(segment.positions)[1]]
    positions = segment.positions[:, None, None, :]
    *axes, _ = ops.shape(attention_mask)
    rows, slots = ops.shape(segment.positions)
    if rows != 1:
        attention_mask = ops.broadcast_to(attention_mask, (rows, *axes[1:], size))
    places = ops.clip(positions, 0, size - 1)
    places = ops.broadcast_to(places, (*ops.shape(attention_mask)[:3], slots))
    seen = ops.take_along_axis(attention_mask, places, axis=-1)
    return ops.logical_and(seen, positions < size)


def hide_new_entries(entry_mask: Any, slot_positions: Any, index: Any) -> Any:
    """A mask that hides slots of new entries that the caller masked out.

    Args:
        entry_mask: Boolean `(B, T)`: `False` hides new entry `t` of row `b`.
        slot_positions: int32 `(1 | B, n)`.
        index: int32 `(1 | B,)`, the position of entry 0.

    Returns:
        A boolean mask `(B, 1, 1, n)`; slots written before this call stay seen.
    """
    batch, length = ops.shape(entry_mask)
    entry = slot_positions - index[:, None]
    is_new = ops.logical_and(entry >= 0, entry < length)
    entry = ops.broadcast_to(
        ops.clip(entry, 0, length - 1), (batch, ops.shape(slot_positions)[1])
    )
    seen = ops.take_along_axis(ops.cast(entry_mask, "bool"), entry, axis=1)
    return ops.logical_or(ops.logical_not(is_new), seen)[:, None, None, :]


def check_mask_shape(mask: Any, shape: Sequence[int | None]) -> None:
    """Refuses an `attention_mask` that doesn't fit.

    Args:
        mask: Tensor of shape `(T, S)`, `(B, T, S)` or `(B, N, T, S)`; any axis may
            be 1.
        shape: `(B, N, T, S)`; `None` where a size is unknown.

    Raises:
        ValueError: The mask doesn't broadcast to `shape`.
    """
    mask_shape = tuple(mask.shape)
    expected = shape[:1] + shape[2:] if len(mask_shape) == 3 else shape
    fits = 2 <= len(mask_shape) <= 4 and all(
        None in (have, need) or have in (1, need)
        for have, need in zip(mask_shape[::-1], expected[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            "`attention_mask` must have the shape (T, S), (B, T, S) or "
            "(B, N, T, S), sizes of 1 included, where (B, N, T, S) = "
            f"{tuple(shape)}. Received: attention_mask.shape={mask_shape}"
        )


def align_mask(mask: Any) -> Any:
    """Converts an `attention_mask` of two to four axes to a boolean one of four.

    Raises:
        ValueError: Its values are known and not all 0 or 1, as those of a mask that
            is meant to be added to scores.
    """
    if keras.backend.is_float_dtype(keras.backend.standardize_dtype(mask.dtype)):
        value = concrete_value(mask)
        if value is not None and ((value != 0) & (value != 1)).any():
            raise ValueError(
                "`attention_mask` must be boolean, or 1 for what is attended and 0 "
                f"for what isn't. Received: values from {value.min()} to {value.max()}"
            )
    mask = ops.cast(mask, "bool")
    if len(mask.shape) == 3:
        return mask[:, None]
    return mask if len(mask.shape) == 4 else mask[None, None]


def view_masks(
    view: View,
    query_positions: Any,
    *,
    causal: bool = False,
    sliding_window: int | None = None,
    attention_mask: Any = None,
    query_mask: Any = None,
    entry_masks: Sequence[Any] = (),
    index: Any = 0,
) -> tuple[Any, ...]:
    """Combines all masks and rules into one mask for each segment.

    Args:
        view: A `View`.
        query_positions: int32 `(1 | B, T)`.
        causal: Whether later positions are hidden.
        sliding_window: `W` or `None`, as in `position_mask`.
        attention_mask: Boolean with four axes, the last one over positions, or
            `None`. It takes the place of `view.fill`.
        query_mask: Boolean `(B, T)`, `False` for a query that attends nothing.
        entry_masks: Boolean `(B, T')` masks of the entries written in this call.
        index: Position of the first of these entries, as in `token_positions`.

    Returns:
        A tuple with a boolean mask `(1 | B, 1 | N, 1 | T, n)` for each segment,
        or `None` for one that is seen whole.
    """
    fill = view.fill if attention_mask is None else None
    windows = [width for width in (sliding_window, view.window) if width is not None]
    window = min(windows, default=None)
    entry_index = token_positions(index, 1)[:, 0]
    masks, first = [], 0
    for segment in view.segments:
        slots = ops.shape(segment.positions)[1]
        rules = [
            position_mask(
                query_positions,
                segment,
                fill=fill,
                causal=causal,
                sliding_window=window,
                sinks=view.sinks,
            )
        ]
        if attention_mask is not None:
            rules.append(mask_of_positions(attention_mask, segment, first))
        if query_mask is not None:
            rules.append(ops.cast(query_mask, "bool")[:, None, :, None])
        for mask in entry_masks:
            rules.append(hide_new_entries(mask, segment.positions, entry_index))
        masks.append(_all_of(rules))
        first += slots
    return tuple(masks)


def whole_mask(segment: Segment, mask: Any) -> Any:
    """Broadcasts a mask to all slots of a segment; `None` becomes `True` everywhere."""
    mask = ops.ones((1, 1, 1, 1), "bool") if mask is None else mask
    slots = ops.shape(segment.positions)[1]
    return ops.broadcast_to(mask, (*ops.shape(mask)[:3], slots))


def _all_of(rules):
    """Conjunction of masks of which some are `None`."""
    mask = None
    for rule in rules:
        if rule is not None:
            mask = rule if mask is None else ops.logical_and(mask, rule)
    return mask
