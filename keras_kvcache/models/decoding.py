"""What a decoder language model needs to generate: its caches and its generator."""

from keras_kvcache.caches import CacheSpec
from keras_kvcache.generation import GenerateMethods, Generator


class DecodingMethods(GenerateMethods):
    """Gives `DecoderLM` its `init_cache`, `generate` and `stream`."""

    def cache_spec(self, batch_size, max_length=None, dtype=None, layout="head_major"):
        """What one layer's cache would be; the model has `num_layers` of them.

        Args:
            batch_size: `B`.
            max_length: `S`; `None` for `max_sequence_length`.
            dtype: Dtype of the entries; `None` for the model's compute dtype.
            layout: `"head_major"` or `"dense"`, as in `CacheSpec`.

        Returns:
            A `keras_kvcache.caches.CacheSpec`.
        """
        return CacheSpec(
            batch_size,
            self.max_sequence_length if max_length is None else max_length,
            self.num_key_value_heads,
            self.head_dim,
            dtype=dtype or self.compute_dtype,
            layout=layout,
        )

    def init_cache(self, batch_size, max_length=None, dtype=None, layout="head_major"):
        """Empty caches, a tuple of one a layer. Arguments as in `cache_spec`."""
        spec = self.cache_spec(batch_size, max_length, dtype, layout)
        return tuple(spec.allocate() for _ in range(self.num_layers))

    @property
    def generator(self):
        """The `Generator` behind `generate` and `stream`."""
        if self._generator is None:
            self._generator = Generator(
                self,
                step=self.hidden_with_cache,
                init_cache=self.init_cache,
                logits=self.logits,
                tokenizer=self.tokenizer,
                max_sequence_length=self.max_sequence_length,
                vocabulary_size=self.vocabulary_size,
            )
        return self._generator
