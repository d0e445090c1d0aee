"""How positions are rotated, by a `config.json`."""

from __future__ import annotations

from typing import Any

from keras_kvcache.attention.rotary import llama3_frequency_factors
from keras_kvcache.families.fields import Fields

# The kinds whose frequencies are fixed.
_ROPE_TYPES = ("default", "linear", "llama3")


def rope_options(
    fields: Fields, head_dim: int, default_theta: float, may_rotate_partly: bool = False
) -> dict[str, Any]:
    """Arguments of the decoder that say how positions are rotated.

    transformers 5 writes all of it into `rope_parameters`; before, there were
    `rope_theta` and `rope_scaling`.

    Args:
        fields: Of the config.
        head_dim: `H`.
        default_theta: The base of the frequencies if none is given.
        may_rotate_partly: Whether the family rotates but a part of a head where it
            is told to.
    """
    path = "rope_scaling" if fields.mapping("rope_scaling") else "rope_parameters"
    theta = fields.real("rope_theta", default_theta)
    values = dict(fields.mapping(path))
    partial = fields.values.get("partial_rotary_factor")
    if partial is not None:
        values.setdefault("partial_rotary_factor", partial)
    rotation = read_rotation(
        fields, values, f"{path}.", head_dim, theta, may_rotate_partly
    )
    return as_rope_arguments(rotation)


def as_rope_arguments(rotation: dict[str, Any]) -> dict[str, Any]:
    """A rotation's options as the decoder's arguments of these meanings."""
    names = dict(
        max_wavelength="rope_max_wavelength",
        scaling_factor="rope_position_scaling_factor",
        frequency_factors="rope_frequency_factors",
    )
    return {names.get(name, name): value for name, value in rotation.items()}


def read_rotation(
    fields: Fields,
    values: dict[str, Any],
    path: str,
    head_dim: int,
    theta: float,
    may_rotate_partly: bool = False,
) -> dict[str, Any]:
    """Options of one rotation, by `RotaryEmbedding`'s argument names.

    Args:
        fields: Of the whole config.
        values: What it says of this rotation.
        path: Before their keys in messages, such as `"rope_scaling."`.
        head_dim: `H`.
        theta: The base of the frequencies if `values` have none.
        may_rotate_partly: As in `rope_options`.

    Raises:
        ValueError: It's of a kind whose frequencies aren't fixed.
    """
    for key, value in values.items():
        if isinstance(value, dict):
            raise ValueError(
                f"`{path}{key}` must be a number or a name, as all layers rotate "
                f"alike. Received: {value}"
            )
    rope = Fields(values, path)
    key = "rope_type" if "rope_type" in values else "type"
    kind = rope.choice(key, {name: name for name in _ROPE_TYPES}, "default")
    theta = rope.real("rope_theta", theta)
    options = dict(max_wavelength=theta, scaling_factor=1.0, frequency_factors=None)
    rotary_dim = head_dim
    if may_rotate_partly:
        rotary_dim = int(head_dim * rope.real("partial_rotary_factor", 1.0))
        options["rotary_dim"] = None if rotary_dim == head_dim else rotary_dim
    else:
        rope.must_be("partial_rotary_factor", 1.0)
    if kind == "linear":
        options["scaling_factor"] = rope.real("factor")
    if kind == "llama3":
        named = "original_max_position_embeddings"
        longest = fields.size("max_position_embeddings")
        options["frequency_factors"] = llama3_frequency_factors(
            rotary_dim,
            theta,
            rope.real("factor"),
            rope.real("low_freq_factor"),
            rope.real("high_freq_factor"),
            fields.size(named, rope.size(named, longest)),
        )
    return options
