"""Tensors on several devices, laid out as `keras.distribution` has it."""

from typing import Any

import keras


def distribute(array: Any, heads_axis: int | None = None) -> Any:
    """Lays an array out by rows and by key/value heads, if a distribution is set.

    Rows are split along the mesh's batch axis and heads along the largest other one
    that divides their number; what can't be split evenly is replicated.

    Args:
        array: Tensor with rows on axis 0.
        heads_axis: Where the heads are; `None` if it has none.

    Returns:
        The tensor, distributed.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return array
    batch_axis, sizes = distribution.batch_dim_name, _axis_sizes(distribution)
    axes = [None] * len(array.shape)
    if rows_divide(array.shape[0]):
        axes[0] = batch_axis
    if heads_axis is not None:
        heads = array.shape[heads_axis]
        others = [a for a in sizes if a != batch_axis and heads % sizes[a] == 0]
        axes[heads_axis] = max(others, key=sizes.get, default=None)
    layout = keras.distribution.TensorLayout(axes, distribution.device_mesh)
    return keras.distribution.distribute_tensor(array, layout)


def rows_divide(rows: int) -> bool:
    """Whether rows can be split evenly over devices; `True` without a distribution."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return True
    return rows % _axis_sizes(distribution)[distribution.batch_dim_name] == 0


def _axis_sizes(distribution):
    mesh = distribution.device_mesh
    return dict(zip(mesh.axis_names, mesh.shape, strict=True))
