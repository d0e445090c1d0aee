"""The models that the benchmarks measure."""

from pathlib import Path
from typing import NamedTuple

import keras_kvcache  # isort: skip  # First: it chooses JAX.
import keras
import numpy as np

from keras_kvcache.generation.buckets import capacity_for
from keras_kvcache.loaders import fetch
from keras_kvcache.runtime.platform import preferred_dtype

SMOLLM2 = "smollm2_135m_instruct"
GPT2 = dict(vocabulary_size=50257, num_layers=12, num_query_heads=12, hidden_dim=768)
LLAMA_1B = dict(
    vocabulary_size=128256,
    num_layers=16,
    num_query_heads=32,
    num_key_value_heads=8,
    hidden_dim=2048,
    intermediate_dim=8192,
    max_sequence_length=8192,
)
TINY = dict(
    vocabulary_size=211,
    num_layers=2,
    num_query_heads=6,
    hidden_dim=48,
    # Large weights, so that answers vary.
    kernel_initializer=keras.initializers.RandomNormal(stddev=0.4),
)


class RoomyLM(keras_kvcache.DecoderLM):
    """A `DecoderLM` whose caches have at least `room` slots, used or not."""

    room = 1

    def init_cache(self, batch_size, max_length=None, **options):
        room = capacity_for(self.room, self.max_sequence_length)
        return super().init_cache(batch_size, max(room, max_length or 0), **options)


class Subject(NamedTuple):
    """A model that is measured."""

    name: str
    lm: RoomyLM
    gguf: Path | None = None

    def prompt(self, length, seed=0):
        """Random token ids; what they say costs nothing."""
        rng = np.random.default_rng(seed)
        return rng.integers(0, self.lm.vocabulary_size, length).tolist()


def gpt2(quick):
    """A GPT-2 of 124 million random parameters, or a tiny one."""
    keras.utils.set_random_seed(0)
    sizes = TINY if quick else GPT2
    lm = RoomyLM(
        **sizes,
        intermediate_dim=4 * sizes["hidden_dim"],
        max_sequence_length=1024,
        normalization="layer_norm",
        position_embedding="learned",
        activation="gelu_tanh",
        gated_feedforward=False,
        use_bias=True,
    )
    return Subject("tiny GPT-2" if quick else "GPT-2 124M", lm)


def llama_1b(quick):
    """A Llama of 1.2 billion random parameters in bfloat16, or a tiny one."""
    if quick:
        return smollm2(quick)
    keras.utils.set_random_seed(0)
    return Subject("Llama 1.2B", RoomyLM(**LLAMA_1B, dtype=preferred_dtype()))


def smollm2(quick):
    """SmolLM2-135M as published, or a tiny random model of its kind."""
    if not quick:
        return Subject("SmolLM2-135M", RoomyLM.from_preset(SMOLLM2), fetch(SMOLLM2))
    keras.utils.set_random_seed(0)
    lm = RoomyLM(
        **TINY,
        num_key_value_heads=2,
        intermediate_dim=128,
        max_sequence_length=8192,
    )
    return Subject("tiny Llama", lm)
