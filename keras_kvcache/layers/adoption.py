"""Layers made of parts that belong to another model too."""

from types import MappingProxyType
from typing import Any

import keras

from keras_kvcache.layers.quantization import KeepsQuantization


class AdoptsParts(KeepsQuantization):
    """A layer with `adopt`, by which it takes parts that were built elsewhere."""

    _parts = MappingProxyType({})

    def adopt(self, **parts: Any) -> None:
        """Uses layers of another model as parts of this one.

        Both then have the same variables: what trains, quantizes or loads one is
        seen by the other, and nothing is copied.

        Args:
            **parts: By the name of the attribute a layer, or a dictionary of what
                the part of that name shall adopt in its turn. What isn't named is
                made anew.

        Raises:
            ValueError: This layer has made its own parts already.
        """
        if self.built:
            raise ValueError(
                "`adopt` must come before `build`, which makes the parts that aren't "
                f"given. Received: {', '.join(parts)} for {self.name}, which is built"
            )
        # A proxy, which Keras doesn't track: layers are tracked where they are used.
        self._parts = MappingProxyType(parts)

    def _part(self, name, make, *shapes):
        """The part given by this name, or the one that `make()` gives.

        It's built for `shapes`, if any are named, unless it is built already.
        """
        part = given = self._parts.get(name)
        if not isinstance(given, keras.layers.Layer):
            part = make()
            self._hand_down(part)
            if given is not None:
                part.adopt(**given)
        if shapes and not part.built:
            part.build(*shapes)
        return part
