"""What does one line make of keras-hub's models, family by family?

Each family has a model of about 100 million random parameters in its proportions,
float32, batch 1, run by keras-hub's own `generate` and through this package, which
shares its weights. Both choose the same tokens, or the benchmark ends.

keras-hub runs as many prompt tokens as there is room for and attends all slots in
every step, so its time a token is the difference between two prompts, of which one
leaves room for a single token, and holds for any fill. Ours depends on the fill:
`early` is measured after a prompt of 64 tokens, `late` where the room ends, both as
the time between the first token of a stream and its last. The first token is that of
a prompt of 32 tokens.

`weights, ms` is what reading the weights takes at the memory's speed, measured in the
same rounds: no decoder of float32 weights takes less, so `times at most` is all that
can be gained.
"""

import functools
import statistics
from typing import NamedTuple

import harness

import keras_kvcache  # isort: skip  # First: it chooses JAX.
import keras
import keras_hub
import numpy as np

EARLY, FIRST = 64, 32
VOCABULARY = dict(vocabulary_size=32000)
# Of the smallest published model each, scaled down; most have 32,000 tokens here.
GPT2 = dict(
    num_layers=12,
    num_heads=12,
    hidden_dim=768,
    intermediate_dim=3072,
    max_sequence_length=4096,
)
LLAMA = dict(
    VOCABULARY,
    num_layers=10,
    hidden_dim=768,
    intermediate_dim=2048,
    num_query_heads=12,
    num_key_value_heads=12,
)
GROUPED = dict(LLAMA, num_key_value_heads=3)
FAMILIES = {
    "GPT-2": ("GPT2", dict(GPT2, vocabulary_size=50257)),
    "OPT": ("OPT", dict(GPT2, vocabulary_size=50272)),
    "Llama": ("Llama", LLAMA),
    "Llama 3": ("Llama3", dict(GROUPED, rope_max_wavelength=500000)),
    "Mistral": ("Mistral", dict(GROUPED, sliding_window=4096)),
    "Mixtral": (
        "Mixtral",
        dict(
            VOCABULARY,
            num_layers=8,
            hidden_dim=512,
            intermediate_dim=896,
            num_query_heads=8,
            num_key_value_heads=2,
            num_experts=8,
            top_k=2,
            sliding_window=4096,
        ),
    ),
    "Phi-3": ("Phi3", LLAMA),
    "Qwen 2.5": (
        "Qwen",
        dict(
            LLAMA,
            num_key_value_heads=2,
            intermediate_dim=3072,
            tie_word_embeddings=True,
        ),
    ),
    "Qwen 3": (
        "Qwen3",
        dict(
            VOCABULARY,
            num_layers=12,
            hidden_dim=640,
            intermediate_dim=1920,
            num_query_heads=10,
            num_key_value_heads=5,
            head_dim=128,
        ),
    ),
    "Gemma": (
        "Gemma",
        dict(
            VOCABULARY,
            num_layers=12,
            hidden_dim=512,
            intermediate_dim=2 * 4096,
            num_query_heads=4,
            num_key_value_heads=1,
            head_dim=128,
        ),
    ),
    "Gemma 2": (
        "Gemma",
        dict(
            VOCABULARY,
            num_layers=16,
            hidden_dim=576,
            intermediate_dim=2 * 2304,
            num_query_heads=4,
            num_key_value_heads=2,
            head_dim=128,
            use_post_ffw_norm=True,
            use_post_attention_norm=True,
            attention_logit_soft_cap=50.0,
            final_logit_soft_cap=30.0,
            use_sliding_window_attention=True,
            sliding_window_size=4096,
        ),
    ),
    "Gemma 3": (
        "Gemma3",
        dict(
            VOCABULARY,
            num_layers=12,
            hidden_dim=576,
            intermediate_dim=3456,
            num_query_heads=4,
            num_key_value_heads=1,
            head_dim=128,
            use_post_ffw_norm=True,
            use_post_attention_norm=True,
            use_sliding_window_attention=True,
            sliding_window_size=512,
            image_size=None,
        ),
    ),
}
TINY = dict(vocabulary_size=211, num_layers=2, hidden_dim=48, intermediate_dim=64)


class Sizes(NamedTuple):
    """How much is measured."""

    capacity: int
    new_tokens: int
    rounds: int


# keras-hub's prompt takes as long as a hundred tokens, and no two as long: with fewer
# tokens their time would be lost in the difference.
FULL = (
    Sizes(capacity=1024, new_tokens=128, rounds=3),
    Sizes(capacity=4096, new_tokens=256, rounds=2),  # minutes each
)
QUICK = (Sizes(capacity=96, new_tokens=8, rounds=2),)


def main():
    options = harness.read_arguments("Times keras-hub's families, before and after.")
    report = harness.Report("hub_families", options)
    read_memory = harness.MemoryReader(options.quick)
    for sizes in QUICK if options.quick else FULL:
        for name, (kind, arguments) in FAMILIES.items():
            causal_lm = make(kind, arguments, options.quick)
            measure(report, name, causal_lm, sizes, read_memory)
    report.finish()


def make(kind, arguments, quick):
    """A model of a family with random weights."""
    keras.utils.set_random_seed(0)
    if quick:
        heads = {key: 2 for key in arguments if key.endswith("heads")}
        head_dim = {"head_dim": 24} if "head_dim" in arguments else {}
        arguments = {**arguments, **TINY, **heads, **head_dim}
    backbone = getattr(keras_hub.models, f"{kind}Backbone")(**arguments)
    causal_lm = getattr(keras_hub.models, f"{kind}CausalLM")(
        backbone=backbone, preprocessor=None
    )
    causal_lm.compile(sampler="greedy")
    return causal_lm


def measure(report, name, causal_lm, sizes, read_memory):
    """Adds a row for one family and one capacity."""
    capacity = sizes.capacity
    rng = np.random.default_rng(0)
    prompt = rng.integers(1, causal_lm.backbone.vocabulary_size, capacity)
    one, many = capacity - 1, capacity - 1 - sizes.new_tokens
    hub = causal_lm.make_generate_function()

    def by_hub(length):
        return np.asarray(hub(inputs(prompt, length), None)["token_ids"])

    # Compiled while `generate_step` is keras-hub's.
    expected = by_hub(many)

    with keras_kvcache.accelerate(causal_lm) as acceleration:
        ours = causal_lm.generate(inputs(prompt, many), stop_token_ids=None)
        if not np.array_equal(expected, ours["token_ids"]):
            raise SystemExit(f"{name}: keras-hub and keras-kvcache disagree")
        lm = acceleration.model

    def stream(length):
        return lm.stream(prompt[:length].tolist(), max_length=capacity)

    clocks = {
        kind: harness.StreamClock(functools.partial(stream, length), sizes.new_tokens)
        for kind, length in (("late", many), ("early", min(EARLY, capacity // 4)))
    }
    seconds = harness.time_interleaved(
        {
            "hub one": functools.partial(by_hub, one),
            "hub many": functools.partial(by_hub, many),
            "first": lambda: next(stream(min(FIRST, capacity // 4))),
            "memory": read_memory,
            **clocks,
        },
        sizes.rounds,
    )
    per_token = {
        kind: statistics.median(clock.seconds) for kind, clock in clocks.items()
    }
    per_token["hub"] = statistics.median(
        (many - one) / sizes.new_tokens
        for many, one in zip(seconds["hub many"], seconds["hub one"], strict=True)
    )
    bandwidth = read_memory.nbytes / statistics.median(seconds["memory"])
    floor = harness.weight_bytes(lm) / bandwidth
    first_hub, first_ours = (
        statistics.median(seconds[key]) for key in ("hub one", "first")
    )
    report.add(
        family=name,
        parameters=f"{causal_lm.count_params() / 1e6:.0f} M",
        capacity=capacity,
        **{"keras-hub, ms": 1e3 * per_token["hub"]},
        **{"early, ms": 1e3 * per_token["early"]},
        **{"late, ms": 1e3 * per_token["late"]},
        **{"times early": per_token["hub"] / per_token["early"]},
        **{"times late": per_token["hub"] / per_token["late"]},
        **{"weights, ms": 1e3 * floor, "times at most": per_token["hub"] / floor},
        **{"keras-hub, first s": first_hub, "first s": first_ours},
        **{"times first": first_hub / first_ours},
    )


def inputs(prompt, length):
    """A prompt of some length in keras-hub's form, with room for all of it."""
    mask = np.arange(len(prompt)) < length
    token_ids = np.where(mask, prompt, 0).astype("int32")
    return {"token_ids": token_ids[None], "padding_mask": mask[None]}


if __name__ == "__main__":
    main()
