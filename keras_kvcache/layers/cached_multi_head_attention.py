"""Multi-head attention with a key/value cache."""

import keras
from keras import ops

from keras_kvcache.caches import Cache
from keras_kvcache.layers.attention_checks import (
    as_cache,
    check_constructor,
    check_entry_mask,
)
from keras_kvcache.ops import (
    attend,
    attend_fused,
    attend_with_scores,
    broadcast_mask,
    check_index,
    sequence_view,
    token_positions,
    view_masks,
)


@keras.saving.register_keras_serializable(package="keras_kvcache")
class CachedMultiHeadAttention(keras.layers.MultiHeadAttention):
    """Multi-head attention that can keep its keys and values in a cache.

    Three modes, told apart by the call:

    1. No cache: plain multi-head attention.
    2. `cache` without `cache_update_index`: the cached projections are attended;
       `value` and `key` are ignored. This is how a decoder attends an encoder.
    3. `cache` and `cache_update_index`: `value` and `key` are projected, the new
       entries are written into the cache from the index on, then attention sees
       what the cache holds up to and including them.

    It has the weights of `keras.layers.MultiHeadAttention` (names, shapes and
    order), and stands in for keras-hub's layer of the same name.

    Letters: `B` batch, `T` query tokens, `S` cache slots, `D` width, `N` query
    heads, `K` key/value heads, `H` head size.

    Args:
        num_heads: `N`.
        key_dim: `H`, size of a query and key head.
        value_dim, dropout, use_bias, output_shape, attention_axes,
            sliding_window, use_gate, seed, kernel_initializer, bias_initializer,
            kernel_regularizer, bias_regularizer, activity_regularizer,
            kernel_constraint, bias_constraint: As in
            `keras.layers.MultiHeadAttention`. `attention_axes` other than axis 1
            can't be combined with a cache.
        flash_attention: As in Keras where there is no cache. With a cache the
            scores of a whole sequence never exist at once, whatever this says.
        num_key_value_heads: `K`, a divisor of `N`; query heads share key/value
            heads in groups of `N / K` (Ainslie et al., 2023,
            https://arxiv.org/abs/2305.13245). `None` for `N`.
        rotary_embedding: A layer called as `rotary(x, positions=positions)` on
            `(B, T, heads, H)`, applied to queries, and to keys before they are
            cached. `keras_kvcache.layers.RotaryEmbedding` is one.
        query_norm, key_norm: Layers applied to queries and keys `(B, T, heads,
            H)` before rotation, such as `keras.layers.RMSNormalization()`.
        query_scale: Factor of the scores. `None` for `H ** -0.5`.
        logit_soft_cap: If given, scores become `cap · tanh(scores / cap)`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        query: `(B, T, D)`.
        value: `(B, T', D)`. Without a cache `T'` is the length attended; with an
            index it is how many entries are written.
        key: `(B, T', D)`; `None` for `value`.
        attention_mask: Boolean or 0/1, `(T, S)`, `(B, T, S)` or `(B, N, T, S)`,
            sizes of 1 broadcast; `S` are the slots if there is a cache. It takes
            the place of the default by which, with an index, slots at or past
            `index + T'` are not attended.
        cache: The dense tensor `(B, 2, S, K, H)`, keys at 0 and values at 1 of
            axis 1, or a cache object of `keras_kvcache.caches`. What is returned
            is of the same kind and dtype; the layer's own dtype doesn't matter.
        cache_update_index: Slot of the first new entry, which is also its
            position: an int, a scalar tensor, or one per row, `(B,)`.
        return_attention_scores: Whether to return the attention weights
            `(B, N, T, S)` too.
        training: Whether dropout is active.
        use_causal_mask: Whether to hide later positions. Without an index,
            queries stand at 0, 1, 2, …; with one, at index, index + 1, …
        query_mask, value_mask, key_mask: Boolean `(B, T)` and `(B, T')` masks,
            which Keras fills in from masks that the inputs carry.

    Returns:
        `output`, `(output, scores)`, `(output, cache)` or `(output, scores,
        cache)`, with `output` of shape `(B, T, D)`. A query with nothing to
        attend gives zeros before the output projection.

    Raises:
        ValueError: A shape, an index or an argument doesn't fit; the message
            names it. An index that is traced can't be checked: entries past the
            end are then dropped, and every stored entry stays as it was.
        TypeError: An index that isn't an integer, a cache that doesn't hold
            floats.
    """

    def __init__(
        self,
        num_heads,
        key_dim,
        *args,
        flash_attention=None,
        num_key_value_heads=None,
        rotary_embedding=None,
        query_norm=None,
        key_norm=None,
        query_scale=None,
        logit_soft_cap=None,
        **kwargs,
    ):
        super().__init__(
            num_heads, key_dim, *args, flash_attention=flash_attention, **kwargs
        )
        check_constructor(num_heads, num_key_value_heads, query_scale, logit_soft_cap)
        # Keras casts every float argument of an autocasting layer, the cache
        # too. The sublayers cast what they are called with by themselves.
        self.autocast = False
        self._flash_attention_argument = flash_attention
        self._num_key_value_heads = num_key_value_heads or num_heads
        self._rotary_embedding = rotary_embedding
        self._query_norm = query_norm
        self._key_norm = key_norm
        self._query_scale = query_scale
        if query_scale is not None:
            self._inverse_sqrt_key_dim = float(query_scale)
        self._logit_soft_cap = logit_soft_cap

    @property
    def num_key_value_heads(self):
        """`K`, the number of key/value heads."""
        return self._num_key_value_heads

    def build(self, query_shape, value_shape, key_shape=None):
        """Creates the projections.

        Args:
            query_shape: `(B, T, D)`.
            value_shape: `(B, T', D)`.
            key_shape: `(B, T', D)`; `None` for `value_shape`.
        """
        key_shape = value_shape if key_shape is None else key_shape
        if tuple(value_shape[1:-1]) != tuple(key_shape[1:-1]):
            raise ValueError(
                "`value` and `key` may differ in their last axis only. Received: "
                f"value_shape={value_shape}, key_shape={key_shape}"
            )
        heads, group_heads = self._num_heads, self._num_key_value_heads
        self._query_dense = self._projection("query", query_shape, heads, self._key_dim)
        self._key_dense = self._projection("key", key_shape, group_heads, self._key_dim)
        if self._use_gate:
            self._gate_dense = self._projection(
                "gate", query_shape, heads, self._value_dim, activation="sigmoid"
            )
        self._value_dense = self._projection(
            "value", value_shape, group_heads, self._value_dim
        )
        self._build_attention(len(query_shape) + 1)
        self._output_dense = self._make_output_dense(
            query_shape, self._get_common_kwargs_for_sublayer(), "attention_output"
        )
        self._output_dense.build((*query_shape[:-1], heads, self._value_dim))
        for layer, shape, layer_heads in (
            (self._query_norm, query_shape, heads),
            (self._key_norm, key_shape, group_heads),
            (self._rotary_embedding, query_shape, heads),
        ):
            if layer is not None and not layer.built:
                layer.build((*shape[:-1], layer_heads, self._key_dim))

    def _projection(self, name, input_shape, heads, head_dim, activation=None):
        free = "abcdefgh"[: len(input_shape) - 1]
        layer = keras.layers.EinsumDense(
            f"{free}x,xnh->{free}nh",
            output_shape=[None] * (len(free) - 1) + [heads, head_dim],
            bias_axes="nh" if self._use_bias else None,
            activation=activation,
            name=name,
            **self._get_common_kwargs_for_sublayer(),
        )
        layer.build(input_shape)
        return layer

    def call(
        self,
        query,
        value,
        key=None,
        attention_mask=None,
        cache=None,
        cache_update_index=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
        query_mask=None,
        value_mask=None,
        key_mask=None,
    ):
        """See the class."""
        rules = dict(
            attention_mask=attention_mask,
            use_causal_mask=use_causal_mask,
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
        )
        returns = dict(
            return_attention_scores=return_attention_scores, training=training
        )
        if not self._attends_one_axis(query):
            self._check_left_to_keras(cache)
            return super().call(query, value, key=key, **rules, **returns)

        holder, index = self._check_call(
            query, value, cache, cache_update_index, query_mask, value_mask, key_mask
        )
        key = value if key is None else key
        queries = self._project_query(query, index)
        if cache is None:
            entries = self._project_entries(key, value, index)
            output, scores = self._attend_sequence(queries, *entries, rules, **returns)
        else:
            if cache_update_index is None:
                view = holder.view()
            else:
                entries = self._project_entries(key, value, index)
                holder, view = holder.update(*entries, index)
            masks = self._masks(queries, view, index, **rules)
            output, scores = self._attend_view(queries, view, masks, **returns)
        output = ops.cast(output, self.compute_dtype)
        if self._use_gate:
            output = output * self._gate_dense(query)
        output = self._output_dense(output)

        returned = (output,)
        if return_attention_scores:
            returned += (ops.cast(scores, self.compute_dtype),)
        if cache is not None:
            returned += (holder if isinstance(cache, Cache) else holder.tensor,)
        return returned if len(returned) > 1 else output

    def _project_query(self, query, index):
        """`(B, T, D)` to queries `(B, T, N, H)`, normed and rotated."""
        queries = self._query_dense(query)
        if self._query_norm is not None:
            queries = self._query_norm(queries)
        return self._rotate(queries, index)

    def _project_entries(self, key, value, index):
        """`(B, T', D)` each to what is cached, `(B, T', K, H)` each."""
        keys = self._key_dense(key)
        if self._key_norm is not None:
            keys = self._key_norm(keys)
        return self._rotate(keys, index), self._value_dense(value)

    def _rotate(self, inputs, index):
        if self._rotary_embedding is None:
            return inputs
        positions = token_positions(index, ops.shape(inputs)[1])
        return self._rotary_embedding(inputs, positions=positions)

    def _attend_sequence(self, queries, keys, values, rules, **returns):
        """Attention without a cache, by the platform's fused kernel if it can."""
        view = sequence_view(keys, values)
        fusible = not (
            returns["return_attention_scores"]
            or self._drops(returns["training"])
            or self._logit_soft_cap
        )
        causal = rules["use_causal_mask"]
        only_causal = self._sliding_window is None and all(
            rule is None for name, rule in rules.items() if name != "use_causal_mask"
        )
        masks = (None,)
        if not (fusible and only_causal):
            masks = self._masks(queries, view, 0, **rules)
        if not fusible:
            return self._attend_view(queries, view, masks, **returns)
        output = attend_fused(
            queries,
            keys,
            values,
            masks[0],
            self._inverse_sqrt_key_dim,
            causal=causal and only_causal,
            flash_attention=self._flash_attention,
        )
        return output, None

    def _attend_view(self, queries, view, masks, return_attention_scores, training):
        """Attention over the slots of a cache; `(output, scores or None)`."""
        if not (return_attention_scores or self._drops(training)):
            output = attend(
                queries, view, masks, self._inverse_sqrt_key_dim, self._logit_soft_cap
            )
            return output, None
        return attend_with_scores(
            queries,
            view,
            masks,
            self._inverse_sqrt_key_dim,
            self._logit_soft_cap,
            dropout=lambda weights: self._dropout_layer(weights, training=training),
        )

    def _drops(self, training):
        return self._dropout > 0 and training

    def _masks(
        self,
        queries,
        view,
        index,
        attention_mask,
        use_causal_mask,
        query_mask,
        value_mask,
        key_mask,
    ):
        """What each query may attend in each segment of the view."""
        batch, length, heads, _ = queries.shape
        slots = sum(segment.positions.shape[1] for segment in view.segments)
        if attention_mask is not None:
            attention_mask = broadcast_mask(
                attention_mask, (batch, heads, length, slots)
            )
        return view_masks(
            view,
            token_positions(index, ops.shape(queries)[1]),
            causal=use_causal_mask,
            sliding_window=self._sliding_window,
            attention_mask=attention_mask,
            query_mask=query_mask,
            entry_masks=[mask for mask in (value_mask, key_mask) if mask is not None],
            index=index,
        )

    def _attends_one_axis(self, query):
        return self._attention_axes == (1,) and len(query.shape) == 3

    def _check_left_to_keras(self, cache):
        """Attention over other axes is Keras' own, with what Keras knows."""
        ours = {
            "cache": cache is not None,
            "num_key_value_heads": self._num_key_value_heads != self._num_heads,
            "rotary_embedding": self._rotary_embedding is not None,
            "query_norm": self._query_norm is not None,
            "key_norm": self._key_norm is not None,
            "logit_soft_cap": self._logit_soft_cap is not None,
        }
        asked = [name for name, is_asked in ours.items() if is_asked]
        if asked:
            raise ValueError(
                f"`{asked[0]}` needs inputs of shape (B, T, D) attended over axis 1. "
                f"Received: attention_axes={self._attention_axes}"
            )

    def _check_call(
        self, query, value, cache, cache_update_index, query_mask, value_mask, key_mask
    ):
        """Refuses what doesn't fit; gives the cache object and the index."""
        batch = query.shape[0]
        entries = value.shape[1] if value is not None else None
        holder, index = None, 0
        if cache is not None:
            holder = as_cache(cache)
            holder.check(
                batch, self._num_key_value_heads, self._key_dim, self._value_dim
            )
            if cache_update_index is None:
                entries = holder.capacity
            else:
                index = check_index(cache_update_index, batch, entries, holder.capacity)
        elif cache_update_index is not None:
            raise ValueError(
                "`cache_update_index` needs a `cache`. Received: cache=None, "
                f"cache_update_index={cache_update_index}"
            )
        check_entry_mask("query_mask", query_mask, batch, query.shape[1])
        check_entry_mask("value_mask", value_mask, batch, entries)
        check_entry_mask("key_mask", key_mask, batch, entries)
        return holder, index

    def compute_output_spec(
        self,
        query,
        value,
        key=None,
        attention_mask=None,
        cache=None,
        cache_update_index=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
        query_mask=None,
        value_mask=None,
        key_mask=None,
    ):
        """Shapes and dtypes of what a call returns."""
        if not self._attends_one_axis(query):
            self._check_left_to_keras(cache)
        self._check_call(
            query, value, cache, cache_update_index, query_mask, value_mask, key_mask
        )
        if isinstance(cache, Cache):
            raise TypeError(
                "`cache` must be a dense tensor in a functional model, as Keras "
                f"can't carry other objects there. Received: {type(cache).__name__}"
            )
        output_shape = self.compute_output_shape(query.shape, value.shape)
        returned = (keras.KerasTensor(output_shape, self.compute_dtype),)
        if return_attention_scores:
            slots = value.shape[1] if cache is None else cache.shape[2]
            shape = (query.shape[0], self._num_heads, query.shape[1], slots)
            returned += (keras.KerasTensor(shape, self.compute_dtype),)
        if cache is not None:
            returned += (keras.KerasTensor(cache.shape, cache.dtype),)
        return returned if len(returned) > 1 else returned[0]

    def get_config(self):
        """Constructor arguments."""
        layers = {
            name: layer and keras.saving.serialize_keras_object(layer)
            for name, layer in (
                ("rotary_embedding", self._rotary_embedding),
                ("query_norm", self._query_norm),
                ("key_norm", self._key_norm),
            )
        }
        return {
            **super().get_config(),
            "flash_attention": self._flash_attention_argument,
            "num_key_value_heads": self._num_key_value_heads,
            "query_scale": self._query_scale,
            "logit_soft_cap": self._logit_soft_cap,
            **layers,
        }

    @classmethod
    def from_config(cls, config):
        """The layer that `get_config` describes."""
        config = dict(config)
        for name in ("rotary_embedding", "query_norm", "key_norm"):
            if isinstance(config.get(name), dict):
                config[name] = keras.saving.deserialize_keras_object(config[name])
        return cls(**config)
