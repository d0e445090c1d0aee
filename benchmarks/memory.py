"""How much memory does decoding take beyond the weights?

Nothing is run: each contender's programs are compiled for one row of SmolLM2's shape,
and the compiler says what they take (`memory_analysis()`: arguments, outputs and
temporaries, less what is donated, less the weights). `peak MB` is the larger of running
the prompt and of decoding; `cache MB` is what keys and values as such take.

Ours are the programs of `DecoderLM.generate`: a prompt's longest chunk, which serves
prompts of every length, and the decode loop. keras-hub has one program, which runs a
prompt padded to the capacity and then decodes; it is compiled from the model's
`generate_step`, as `generate` does it.
"""

import functools
import importlib.util

import harness
import jax
import numpy as np
import peer_models
import subjects

from keras_kvcache.generation.buckets import CHUNKS
from keras_kvcache.generation.program import make_program

CAPACITIES, QUICK_CAPACITIES = (256, 512, 1024, 2048, 4096, 8192), (256, 512)


def main():
    options = harness.read_arguments("Weighs decoding, against the cache's capacity.")
    report = harness.Report("memory", options)
    lm = subjects.smollm2(options.quick).lm
    contenders = {"keras-kvcache": functools.partial(weigh_keras_kvcache, lm)}
    if importlib.util.find_spec("keras_hub") is None:
        print("keras-hub is left out: no module keras_hub")
    else:
        hub_lm = peer_models.hub_model(lm)
        contenders["keras-hub"] = functools.partial(weigh_keras_hub, hub_lm)
    for capacity in QUICK_CAPACITIES if options.quick else CAPACITIES:
        cache = lm.cache_bytes(1, capacity).total
        for name, weigh in contenders.items():
            report.add(
                contender=name,
                capacity=capacity,
                **{"cache MB": cache / 1e6, "peak MB": weigh(capacity) / 1e6},
            )
    report.finish()


def weigh_keras_kvcache(lm, capacity):
    """Bytes at the peak of `generate` for one row."""
    cache = jax.eval_shape(lambda: lm.init_cache(1, capacity))
    programs = [lm.generator.lower(cache, chunk) for chunk in (CHUNKS[-1], None)]
    return max(weigh_program(program, lm) for program in programs)


def weigh_keras_hub(lm, capacity):
    """Bytes at the peak of `generate` for one row."""
    generate = make_program(lm.generate_step, lm, static=("stop_token_ids",))
    row = np.zeros((1, capacity), "int32")
    inputs = {"token_ids": row, "padding_mask": row}
    return weigh_program(generate.lower(inputs=inputs, stop_token_ids=None), lm)


def weigh_program(lowered, lm):
    """Bytes that a program takes beyond the weights of its model."""
    memory = lowered.compile().memory_analysis()
    taken = memory.argument_size_in_bytes + memory.output_size_in_bytes
    taken += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return taken - sum(weight.value.nbytes for weight in lm.weights)


if __name__ == "__main__":
    main()
