"""The rolling cache: a ring of slots for a window that moves with the text."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from keras import ops

from keras_kvcache.attention import View
from keras_kvcache.attention.positions import first_positions
from keras_kvcache.attention.ring import ring_positions
from keras_kvcache.caches.cache import Cache
from keras_kvcache.caches.kinds import Rolling
from keras_kvcache.caches.segmentation import ring_slots, whole_groups
from keras_kvcache.caches.storage import Storage, slot_positions
from keras_kvcache.runtime.concrete import concrete_value


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class RollingCache(Cache):
    """Keys and values of the last `W` positions, and of the first few if wanted.

    Position `p` is kept in slot `p % R` of a ring, and nothing is ever moved. The
    number of slots doesn't depend on how long the text grows. A query sees the `W`
    positions that end with its own, as with Mistral's sliding window (Jiang et al.,
    2023, https://arxiv.org/abs/2310.06825), and the attention sinks (Xiao et al.,
    2023, https://arxiv.org/abs/2309.17453), which keep their absolute positions.

    A smaller index rolls it back as long as what the window then spans isn't
    overwritten; see `crop`.

    Attributes:
        sinks: `Storage` of the first positions, exact whatever the codec, as they
            get much of the attention; `None` if they aren't kept.
        window: `W`.
    """

    sinks: Storage | None = None
    window: int = field(default=1, metadata={"static": True})

    @property
    def capacity(self) -> int:
        return self.storage.slots + self.sink_count

    @property
    def max_length(self) -> int | None:
        return None

    @property
    def sink_count(self) -> int:
        """How many of the first positions are kept for good."""
        return 0 if self.sinks is None else self.sinks.slots

    def update(self, key: Any, value: Any, index: Any) -> tuple[Cache, View]:
        index, length = first_positions(index), key.shape[1]
        if length == 0:
            return self, self.view(index)
        fill = self._fill(index, length)
        sinks, residual = self.sinks, self.residual
        if sinks is not None:
            end = ops.minimum(fill, self.sink_count)
            sinks = sinks.write_ring(sinks.encode(key, value), index, end)
        entries = self.storage.encode(key, value, self.codec.residual_codec)
        if residual is None:
            coded, start, end = entries, index, fill
        else:
            residual, entries, start = residual.append(
                lambda slot: self.storage.take(slot % self._ring, self.codec.group),
                entries,
                index,
                fill,
            )
            coded = entries.recode_keys(self.codec)
            end = _groups_end(start, index, fill, self.codec.group)
        cache = replace(
            self, storage=self._write(coded, start, end), residual=residual, sinks=sinks
        )
        if length == 1:
            # What a token evicts is out of its own sight.
            return cache, cache.view(fill)
        # The ring as it was, for early queries, and the new entries beside it.
        segments = (
            *cache._sink_segments(),
            *self._ring_segments(start),
            *self._segments_of(entries, start),
        )
        return cache, self._view(segments, fill)

    def view(self, fill: Any = None) -> View:
        """The `View` for a call that only reads.

        Without `fill`, positions `0 … W - 1` count as held and all are seen, as for a
        short sequence that was written in one call.
        """
        known = ops.full((1,), self.window, "int32") if fill is None else fill
        held = known if self.residual is None else self.residual.start
        segments = (*self._sink_segments(), *self._ring_segments(held))
        if self.residual is not None:
            segments += self._segments_of(self.residual.storage, self.residual.start)
        view = self._view(segments, known)
        return view._replace(window=None) if fill is None else view

    def check_crop(self, fill: np.ndarray, length: np.ndarray) -> None:
        # With W = R = 4, fill 9 holds positions 5 to 8. The next token after length 8
        # sees 5 to 7 and itself; after length 7 it would see 4, which is gone.
        group = self.codec.group
        written = whole_groups(fill, group)
        first_held = np.maximum(written - self._ring, self.sink_count)
        first_seen = np.maximum(length - self.window + 1, self.sink_count)
        # A group that was gone back into is coded again, whole.
        first_needed = np.minimum(first_seen, length // group * group)
        is_gone = first_needed < np.minimum(first_held, length)
        if (is_gone & (written > self._ring)).any():
            raise ValueError(
                "A rolling cache must still hold what is to be seen, but positions "
                f"{first_needed.tolist()} to before {first_held.tolist()} are "
                f"overwritten. Received: fill={fill.tolist()}, "
                f"length={length.tolist()}, window={self.window}"
            )

    def resize_window(self, window: int, fill: Any) -> RollingCache:
        """The cache with another window; see `keras_kvcache.caches.resize_window`."""
        Rolling(window, self.sink_count)
        known, group = concrete_value(fill), self.codec.group
        if known is not None and window > self.window:
            gone = whole_groups(known, group) > self._ring
            if gone.any():
                raise ValueError(
                    "A rolling cache can have a larger window only as long as nothing "
                    f"is overwritten in its {self._ring} slots. Received: "
                    f"fill={known.tolist()}, window={window} for {self.window}"
                )
        held = first_positions(fill)
        if self.residual is not None:
            # The group of the residual is coded too once the cache was rolled back.
            held = ops.minimum(self.residual.start, whole_groups(held, group))
        storage = self.storage.reroll(ring_slots(window, group), held)
        return replace(self, storage=storage, window=window)

    @property
    def _ring(self):
        return self.storage.slots

    def _write(self, coded, start, end):
        """The ring with the entries that stand before `end`."""
        if coded.slots > self.codec.group:
            return self.storage.write_ring(coded, start, end)
        slot = ops.where(end > start, ops.mod(start, self._ring), self._ring)
        return self.storage.write(coded, slot)

    def _ring_segments(self, fill):
        """Segments of a ring that holds positions below `fill`."""
        return self.storage.all_segments(
            lambda *span: self._behind_sinks(ring_positions(fill, self._ring, *span))
        )

    def _segments_of(self, entries, start):
        """Segments of entries from position `start (1 | B,)` on."""
        return entries.all_segments(
            lambda *span: self._behind_sinks(start[:, None] + slot_positions(*span))
        )

    def _sink_segments(self):
        return () if self.sinks is None else self.sinks.all_segments(slot_positions)

    def _behind_sinks(self, positions):
        """Positions, -1 for those that the sinks hold."""
        if self.sinks is None:
            return positions
        return ops.where(positions >= self.sink_count, positions, -1)

    def _view(self, segments, fill):
        storage = self.storage
        return View(
            segments,
            storage.heads,
            storage.value_dim,
            fill,
            self.window,
            self.sink_count,
        )


def _groups_end(start, index, fill, group):
    """The end of the last group with a new entry; `start` if there is none."""
    return ops.where(fill > index, whole_groups(fill, group), start)
