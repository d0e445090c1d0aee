"""How near does decoding come to what the memory allows?

A Llama of 1.2 billion random parameters, in bfloat16 on an accelerator and float32 on a
CPU, decodes one row and 32. A step can't take less than reading the weights and the
filled caches once; `of memory's` is the share of the memory's speed at which that is
done, with the memory measured in the same rounds. 32 rows on a CPU are bound by
arithmetic instead, and left out.

The time of a token is the difference between a generation of some tokens and one of a
single token, both of the same prompts.
"""

import functools
import statistics

import harness
from subjects import LLAMA_1B

import keras_kvcache  # isort: skip  # First: it chooses JAX.
import jax
import jax.numpy as jnp
import keras
import numpy as np

from keras_kvcache.runtime.platform import preferred_dtype

PROMPT = 128
TINY = dict(LLAMA_1B, vocabulary_size=211, num_layers=2, intermediate_dim=64)
TINY |= dict(num_query_heads=6, num_key_value_heads=2, hidden_dim=48)
MEMORY = "memory"


def main():
    options = harness.read_arguments("Times a Llama of 1.2 billion parameters.")
    report = harness.Report("memory_limit", options)
    on_cpu = jax.default_backend() == "cpu"
    # An accelerator's tokens take so little time that it needs more of them.
    new_tokens, rounds = (8, 2) if options.quick else (64 if on_cpu else 512, 5)
    keras.utils.set_random_seed(0)
    lm = keras_kvcache.DecoderLM(
        **(TINY if options.quick else LLAMA_1B), dtype=preferred_dtype()
    )
    read_memory = harness.MemoryReader(options.quick)
    for rows in (1,) if on_cpu and not options.quick else (1, 32):
        measure(report, lm, rows, new_tokens, rounds, read_memory)
    report.finish()


def measure(report, lm, rows, new_tokens, rounds, read_memory):
    """Adds the row of a batch."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, lm.vocabulary_size, (rows, PROMPT)).tolist()
    one, many = (
        functools.partial(
            lm.generate,
            prompts,
            max_new_tokens=count,
            stop_token_ids=None,
        )
        for count in (1, 1 + new_tokens)
    )
    seconds = harness.time_interleaved(
        {"one": one, "many": many, MEMORY: read_memory}, rounds
    )
    pairs = zip(seconds["many"], seconds["one"], strict=True)
    token = statistics.median((many - one) / new_tokens for many, one in pairs)
    bandwidth = read_memory.nbytes / statistics.median(seconds[MEMORY])
    width = jnp.dtype(lm.compute_dtype).itemsize
    caches = lm.cache_bytes(rows, PROMPT + new_tokens // 2).total
    nbytes = harness.weight_bytes(lm) * width / 4 + caches
    row = dict(rows=rows, dtype=lm.compute_dtype, prompt=PROMPT)
    row["ms per token"] = 1e3 * token
    row["GB/s"] = nbytes / token / 1e9
    row["of memory's"] = nbytes / token / bandwidth
    report.add(**row)


if __name__ == "__main__":
    main()
