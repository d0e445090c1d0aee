"""What every cache can do."""

import abc


class Cache(abc.ABC):
    """Keys and values of one layer, seen through one verb.

    A cache is immutable: `update` gives a new one, which a compiled program that
    donates the old one writes in place. It is a JAX pytree of arrays. It doesn't
    know how much of it is filled: the index belongs to the caller, all layers
    share one, and rolling a cache back is passing a smaller index.
    """

    @property
    @abc.abstractmethod
    def capacity(self):
        """`S`, the number of slots."""

    @property
    @abc.abstractmethod
    def nbytes(self):
        """Bytes of all arrays."""

    def __repr__(self):
        # Arrays are long, and Keras puts the arguments of a call in its errors.
        return f"{type(self).__name__}(capacity={self.capacity})"

    @abc.abstractmethod
    def check(self, batch_size, heads, key_dim, value_dim):
        """Raises unless the cache fits attention of these sizes.

        Args:
            batch_size: `B`, or `None` if unknown.
            heads: `K`.
            key_dim: `H`.
            value_dim: `Hv`.

        Raises:
            ValueError: A size differs.
            TypeError: The cache doesn't hold floats.
        """

    @abc.abstractmethod
    def update(self, key, value, index):
        """Writes new entries and shows what may now be attended.

        It's up to the caller to `check` sizes and to check a known index
        (`keras_kvcache.ops.check_index`), as `CachedMultiHeadAttention` does.

        Args:
            key: Tensor `(B, T, K, H)`.
            value: Tensor `(B, T, K, Hv)`.
            index: An int, or an integer tensor of shape `()` or `(B,)`: position
                of the first entry. What doesn't fit is dropped, and every entry
                already stored stays as it was.

        Returns:
            The pair `(cache, view)`: the new cache and a `keras_kvcache.ops.View`
            of what this very call may attend to.
        """

    @abc.abstractmethod
    def view(self, fill=None):
        """What a call that writes nothing may attend to, as a `View`.

        Args:
            fill: int32 `(1,)` or `(B,)`: entries at or past this position are
                not there. `None` if every slot holds one.
        """
