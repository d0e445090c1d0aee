"""Kinds of caches by name: what decides which position has which slot."""

from dataclasses import dataclass

from keras_kvcache.runtime.concrete import is_integer


@dataclass(frozen=True)
class Static:
    """Each position has its slot: see `StaticCache`."""

    name = "static"


@dataclass(frozen=True)
class Rolling:
    """The last positions only: see `RollingCache`.

    Attributes:
        window: `W`, how many positions a query sees, its own included.
        sinks: How many of the first positions are kept and seen besides.

    Raises:
        ValueError: `window` isn't a positive integer, or `sinks` isn't an integer
            from 0 to below it.
    """

    window: int
    sinks: int = 0

    name = "rolling"

    def __post_init__(self):
        for name, least in (("window", 1), ("sinks", 0)):
            value = getattr(self, name)
            if not is_integer(value) or value < least:
                raise ValueError(
                    f"`{name}` must be an integer of at least {least}. Received: "
                    f"{value!r}"
                )
        if self.sinks >= self.window:
            raise ValueError(
                "`sinks` must be smaller than `window`. Received: "
                f"sinks={self.sinks}, window={self.window}"
            )
