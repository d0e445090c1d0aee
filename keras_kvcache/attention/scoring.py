"""How the products of queries and keys become scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from keras import ops

from keras_kvcache.attention.trigonometry import tanh


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class Scoring:
    """How products of queries and keys become scores.

    `score = cap(scale · product) + bias`, and a sink is one more score in the softmax.

    Attributes:
        scale: Factor of the products, usually `H ** -0.5`.
        soft_cap: If given, `cap(x) = soft_cap · tanh(x / soft_cap)` (Gemma 2,
            https://arxiv.org/abs/2408.00118).
        bias: Table `(N, distances)`: entry `d` of a head is added where a slot stands
            `d` positions before the query, the last entry where it stands farther, the
            first where it stands after it: the buckets of T5 (Raffel et al., 2019,
            https://arxiv.org/abs/1910.10683) in a decoder. Or a function of int32
            positions of queries `(1 | B, 1, T, 1)` and of slots `(1 | B, 1, 1, n)`
            whose result broadcasts to `(B, N, T, n)`, such as `Alibi`; kernels don't
            take it. `None` for no bias.
        sink: Logits `(N,)`, a score of each head that takes its share of the weights
            and has no value (gpt-oss, https://arxiv.org/abs/2508.10925). `None` for
            none.
    """

    scale: float
    soft_cap: float | None = None
    bias: Any = None
    sink: Any = None

    @property
    def table(self) -> Any:
        """The table of the bias, or `None`."""
        return None if callable(self.bias) else self.bias

    @property
    def function(self) -> Callable[[Any, Any], Any] | None:
        """The function that is the bias, or `None`."""
        return self.bias if callable(self.bias) else None

    def tree_flatten(self) -> tuple[tuple[Any, Any], tuple[Any, ...]]:
        """The arrays and the static fields."""
        return (self.table, self.sink), (self.scale, self.soft_cap, self.function)

    @classmethod
    def tree_unflatten(
        cls, static: tuple[Any, ...], arrays: tuple[Any, Any]
    ) -> Scoring:
        """The inverse of `tree_flatten`."""
        (table, sink), (scale, soft_cap, function) = arrays, static
        return cls(scale, soft_cap, table if function is None else function, sink)

    def cap(self, products: Any) -> Any:
        """Applies the soft cap to scaled products."""
        if self.soft_cap is None:
            return products
        return self.soft_cap * tanh(products / self.soft_cap)

    def bias_of(self, query_positions: Any, slot_positions: Any, dtype: str) -> Any:
        """The bias that is added to scores.

        Args:
            query_positions: int32 `(1 | B, T)`.
            slot_positions: int32 `(1 | B, n)`.
            dtype: Dtype of the scores.

        Returns:
            A tensor `(1 | B, 1 | N, 1 | T, n)`; `None` for no bias.
        """
        if self.bias is None:
            return None
        query = query_positions[:, None, :, None]
        slot = slot_positions[:, None, None, :]
        if self.function is not None:
            bias = ops.convert_to_tensor(self.function(query, slot))
            bias = ops.reshape(bias, [1] * (4 - len(bias.shape)) + list(bias.shape))
            # All slots, as masks have them.
            return ops.cast(bias, dtype) + ops.zeros(ops.shape(slot), dtype)
        distance = ops.clip(query - slot, 0, self.table.shape[1] - 1)
        bias = ops.take(ops.cast(self.table, dtype), distance[:, 0], axis=1)
        return ops.transpose(bias, (1, 0, 2, 3))


@dataclass(frozen=True)
class Alibi:
    """The bias of ALiBi (Press et al., 2021, https://arxiv.org/abs/2108.12409).

    A slot `d` positions before the query gets `-slope · d`, with a slope a head. Of `N`
    heads, a power of two, the slopes are `2 ** (-8 / N)` and its powers. Of other
    numbers, the first are those of the power of two below, and the rest every second
    one of twice as many heads.

    Attributes:
        num_heads: `N`.
    """

    num_heads: int

    @property
    def slopes(self) -> np.ndarray:
        """float32 `(N,)`."""
        below = 2 ** (self.num_heads.bit_length() - 1)
        slopes = 2.0 ** (-8 / below * np.arange(1, below + 1))
        between = 2.0 ** (-4 / below * np.arange(1, 2 * below, 2))
        return np.append(slopes, between)[: self.num_heads].astype("float32")

    def __call__(self, query: Any, slot: Any) -> Any:
        """A function of positions, as `Scoring.bias`."""
        distance = ops.cast(ops.maximum(query - slot, 0), "float32")
        return -ops.reshape(self.slopes, (-1, 1, 1)) * distance


def check_scoring(scoring: Scoring, heads: int, positions: Any) -> None:
    """Refuses a bias or a sink for other heads, and a bias without positions.

    Args:
        scoring: A `Scoring`.
        heads: `N`.
        positions: Positions of the queries, or `None`.

    Raises:
        ValueError: `bias` isn't a table of `N` rows or a function, `sink` isn't of
            shape `(N,)`, or there is a bias and no positions.
    """
    table, sink = scoring.table, scoring.sink
    if table is not None and (len(table.shape) != 2 or table.shape[0] != heads):
        raise ValueError(
            f"`bias` must be a function or a table (N, distances), N = {heads}. "
            f"Received: bias.shape={tuple(table.shape)}"
        )
    if sink is not None and tuple(sink.shape) != (heads,):
        raise ValueError(
            f"`sink` must have one logit a head, shape ({heads},). Received: "
            f"sink.shape={tuple(sink.shape)}"
        )
    if scoring.bias is not None and positions is None:
        raise ValueError(
            "`positions` of the queries must be given with a bias. Received: None"
        )
