"""Generation from models that users build themselves of the package's layer."""

import keras
import numpy as np
from keras import ops

from keras_kvcache import Generator
from keras_kvcache.caches import CacheSpec
from keras_kvcache.layers import CachedMultiHeadAttention, RotaryEmbedding

V, D, N, K, H = 31, 26, 4, 2, 6


def attention():
    return CachedMultiHeadAttention(
        N, H, num_key_value_heads=K, rotary_embedding=RotaryEmbedding()
    )


class OwnLM(keras.Model):
    def __init__(self):
        super().__init__()
        self.embed = keras.layers.Embedding(V, D, embeddings_initializer="normal")
        self.attention = attention()
        self.project = keras.layers.Dense(V, kernel_initializer="normal")

    def call(self, token_ids, cache=None, cache_update_index=None):
        x = self.embed(token_ids)
        if cache is None:
            return self.project(x + self.attention(x, x, use_causal_mask=True))
        attended, cache = self.attention(
            x,
            x,
            cache=cache,
            cache_update_index=cache_update_index,
            use_causal_mask=True,
        )
        return self.project(x + attended), cache


def rerun(model, prompt, new_tokens):
    ids = list(prompt)
    for _ in range(new_tokens):
        padded = np.zeros((1, 53), "int32")
        padded[0, : len(ids)] = ids
        logits = ops.convert_to_numpy(model(padded))[0, len(ids) - 1]
        ids.append(int(logits.argmax()))
    return ids


def test_a_subclassed_model():
    keras.utils.set_random_seed(3)
    model = OwnLM()  # never called: generation has to make its weights
    generator = Generator(
        model,
        step=lambda ids, cache, index: model(
            ids, cache=cache, cache_update_index=index
        ),
        init_cache=lambda rows, slots: CacheSpec(rows, slots, K, H).allocate(),
        max_sequence_length=47,
    )
    prompts = [[1, 2, 3, 4, 5], [7], [11, 12]]
    answers = generator.generate(prompts, max_new_tokens=23)
    assert answers == [rerun(model, prompt, 23) for prompt in prompts]
    streamed = [ids for ids in generator.stream([7], max_new_tokens=23)]
    assert [7] + [ids[0] for ids in streamed] == answers[1]


class HeadlessLM(OwnLM):
    """Its head is called where a token is sampled only."""

    def call(self, token_ids, cache=None, cache_update_index=None):
        x = self.embed(token_ids)
        attended, cache = self.attention(
            x,
            x,
            cache=cache,
            cache_update_index=cache_update_index,
            use_causal_mask=True,
        )
        return x + attended, cache


def test_a_head_that_was_never_called_is_built():
    keras.utils.set_random_seed(3)
    model, whole = HeadlessLM(), OwnLM()
    whole(np.zeros((1, 2), "int32"))
    generator = Generator(
        model,
        step=lambda ids, cache, index: model(
            ids, cache=cache, cache_update_index=index
        ),
        init_cache=lambda rows, slots: CacheSpec(rows, slots, K, H).allocate(),
        logits=lambda outputs: model.project(outputs),
        max_sequence_length=47,
    )
    generator.generate([1], max_new_tokens=2)
    whole.set_weights(model.get_weights())
    answer = generator.generate([7, 8], max_new_tokens=13)
    assert answer == rerun(whole, [7, 8], 13)


def test_a_functional_model_with_a_dense_cache():
    keras.utils.set_random_seed(5)
    token_ids = keras.Input((None,), dtype="int32")
    cache = keras.Input((2, None, K, H))
    index = keras.Input((), dtype="int32")
    embed = keras.layers.Embedding(V, D, embeddings_initializer="normal")
    layer, project = attention(), keras.layers.Dense(V, kernel_initializer="normal")
    x = embed(token_ids)
    attended, new_cache = layer(
        x, x, cache=cache, cache_update_index=index, use_causal_mask=True
    )
    logits = project(x + attended)
    model = keras.Model([token_ids, cache, index], [logits, new_cache])
    uncached = keras.Model(token_ids, project(x + layer(x, x, use_causal_mask=True)))
    generator = Generator(
        model,
        step=lambda ids, cache, index: model([ids, cache, index]),
        init_cache=lambda rows, slots: ops.zeros((rows, 2, slots, K, H)),
    )
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    answers = generator.generate(prompts, max_new_tokens=19)
    assert answers == [rerun(uncached, prompt, 19) for prompt in prompts]
