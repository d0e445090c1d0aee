"""Reading the config of a Hugging Face model: typed values, rotation, windows."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from keras_kvcache.attention.rotary import llama3_frequency_factors
from keras_kvcache.errors import quoted

_REQUIRED = object()
_SLIDING, _FULL = "sliding_attention", "full_attention"
# What a layer type's rotation is called: the kinds whose frequencies are fixed.
_ROPE_TYPES = ("default", "linear", "llama3")


class Fields:
    """The values of a `config.json`, checked as they are read.

    A value of `null` stands for the default unless said otherwise.

    Args:
        values: By key.
        path: Before the keys in messages, such as `"rope_scaling."`.

    Attributes:
        values: As given.
    """

    def __init__(self, values: Mapping[str, Any], path: str = ""):
        self.values = values
        self._path = path

    def size(self, key: str, default: Any = _REQUIRED, null: Any = _REQUIRED) -> Any:
        """A positive integer; a value of `null` becomes the argument `null`."""
        value, is_given = self._get(key, default, null)
        if is_given and not (_is_number(value, numbers.Integral) and value > 0):
            raise self._error(key, "a positive integer", value)
        return value

    def real(self, key: str, default: Any = _REQUIRED, null: Any = _REQUIRED) -> Any:
        """A positive finite number."""
        value, is_given = self._get(key, default, null)
        if not is_given:
            return value
        is_real = _is_number(value, numbers.Real) and math.isfinite(value)
        if not is_real or value <= 0:
            raise self._error(key, "a positive finite number", value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value, _ = self._get(key, default)
        if not isinstance(value, bool):
            raise self._error(key, "true or false", value)
        return value

    def choice(self, key: str, choices: Mapping[str, str], default: str) -> str:
        """The meaning of a name that must be one of `choices`."""
        value, _ = self._get(key, default)
        if not isinstance(value, str) or value not in choices:
            raise self._error(key, f"one of {', '.join(choices)}", value)
        return choices[value]

    def must_be(self, key: str, *allowed: Any) -> None:
        """Refuses a value that the decoder can't express; an absent one passes."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise self._error(key, " or ".join(map(repr, allowed)) or "absent", value)

    def mapping(self, key: str) -> dict[str, Any]:
        """An object, empty if it is absent or `null`."""
        value, _ = self._get(key, {})
        if not isinstance(value, dict):
            raise self._error(key, "an object or null", value)
        return value

    def _get(self, key, default, null=_REQUIRED):
        """The value, or its default if absent; and whether it was given."""
        if key not in self.values:
            if default is _REQUIRED:
                raise ValueError(f"`{self._path}{key}` must be given. Received: none")
            return default, False
        value = self.values[key]
        if value is not None:
            return value, True
        instead = default if null is _REQUIRED else null
        if instead is _REQUIRED:
            raise self._error(key, "given", value)
        return instead, False

    def _error(self, key, rule, value):
        return ValueError(
            f"`{self._path}{key}` must be {rule}. Received: {quoted(value)}"
        )


def rope_options(
    fields: Fields, head_dim: int, default_theta: float, may_be_partial: bool = False
) -> dict[str, Any]:
    """Arguments of the decoder that say how positions are rotated.

    transformers 5 writes all of it into `rope_parameters`; before, there were
    `rope_theta` and `rope_scaling`.

    Args:
        fields: Of the config.
        head_dim: `H`.
        default_theta: The base of the frequencies if none is given.
        may_be_partial: Whether the family rotates but a part of a head where it
            is told to.
    """
    path = "rope_scaling" if fields.mapping("rope_scaling") else "rope_parameters"
    theta = fields.real("rope_theta", default_theta)
    values = dict(fields.mapping(path))
    partial = fields.values.get("partial_rotary_factor")
    if partial is not None:
        values.setdefault("partial_rotary_factor", partial)
    options = _rope(fields, values, f"{path}.", head_dim, theta, may_be_partial)
    options["rope_max_wavelength"] = options.pop("max_wavelength")
    options["rope_position_scaling_factor"] = options.pop("scaling_factor")
    options["rope_frequency_factors"] = options.pop("frequency_factors")
    return options


def gemma3_rope_options(fields: Fields, head_dim: int, slides: bool) -> dict[str, Any]:
    """As `rope_options`, where layers with a window have a rotation of their own."""
    nested = fields.mapping("rope_parameters")
    if nested and not nested.keys() & {_FULL, _SLIDING}:
        raise ValueError(
            f"`rope_parameters` must have {quoted(_FULL)} and {quoted(_SLIDING)}. "
            f"Received: {nested}"
        )
    by_kind = Fields(nested, "rope_parameters.")
    scaling = fields.mapping("rope_scaling")
    every = _rope(
        fields,
        {**by_kind.mapping(_FULL), **scaling},
        "rope_scaling." if scaling else f"rope_parameters.{_FULL}.",
        head_dim,
        fields.real("rope_theta", 1_000_000.0),
    )
    options = {
        "rope_max_wavelength": every["max_wavelength"],
        "rope_position_scaling_factor": every["scaling_factor"],
        "rope_frequency_factors": every["frequency_factors"],
    }
    if slides:
        path = f"rope_parameters.{_SLIDING}."
        theta = fields.real("rope_local_base_freq", 10_000.0)
        local = _rope(fields, by_kind.mapping(_SLIDING), path, head_dim, theta)
        if local["frequency_factors"] is not None:
            raise ValueError(
                f"`{path}rope_type` must be default or linear. Received: 'llama3'"
            )
        options["rope_local_max_wavelength"] = local["max_wavelength"]
        options["rope_local_position_scaling_factor"] = local["scaling_factor"]
    return options


def _rope(fields, values, path, head_dim, theta, may_be_partial=False):
    """Options of one rotation, by `RotaryEmbedding`'s argument names."""
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
    if may_be_partial:
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


def window_options(
    window: int | None, types: Sequence[str], key: str, value: Any
) -> dict[str, Any]:
    """Arguments of the decoder that say which layers have a window.

    Args:
        window: `W`, or `None`.
        types: Of each layer, `"sliding_attention"` or `"full_attention"`.
        key: What `types` follows from in the config.
        value: Its value there.

    Raises:
        ValueError: The decoder can't have windows in just these layers.
    """
    sliding = [kind == _SLIDING for kind in types]
    if not any(sliding):
        is_known = all(kind == _FULL for kind in types)
        options = {"sliding_window": None, "sliding_window_pattern": None}
    else:
        if window is None:
            raise ValueError(
                "`sliding_window` must be a positive integer where layers slide. "
                "Received: null or switched off"
            )
        pattern = None if all(sliding) else sliding.index(False) + 1
        is_known = all(
            kind == (_FULL if pattern and i % pattern == 0 else _SLIDING)
            for i, kind in enumerate(types, 1)
        )
        options = {"sliding_window": window, "sliding_window_pattern": pattern}
    if not is_known:
        raise ValueError(
            f"`{key}` must give a window to all layers, to none, or to all but every "
            f"n-th. Received: {quoted(value)}"
        )
    return options


def layer_types(fields: Fields, slides: Sequence[bool]) -> list[str]:
    """Reads `layer_types`; where it is absent, `slides` stands for it."""
    types = fields.values.get("layer_types")
    if types is None:
        return [_SLIDING if one else _FULL for one in slides]
    is_list = isinstance(types, list) and all(isinstance(one, str) for one in types)
    if not is_list or len(types) != len(slides):
        raise ValueError(
            f"`layer_types` must be a list of {len(slides)} names. Received: "
            f"{quoted(types)}"
        )
    return types


def _is_number(value, kind):
    return isinstance(value, kind) and not isinstance(value, bool)
