"""What does a token cost, at batch 1?

The time of a token is a difference: a generation of some tokens minus one of a single
token, both of the same prompt and with the same room, one after the other in the same
round. What comes before decoding cancels out. The median over the rounds counts.

The prompt is as long as the fill; decoding goes on from there. The capacity is the
room asked for: keras-hub takes exactly as much, ours the next of its sizes.

keras-hub always runs as many prompt tokens as there is room for and decodes until the
room is full, and attends all of it in every step. Its difference is between two
prompts of which one leaves room for one token and the other for all; so its figure
holds for any fill. It is left out where its prefill would take too much memory.

`of bandwidth` is the share of the memory's speed, measured in the same rounds, at which
weights and the filled cache are read.

One row of each model is `stream`, which hands over every token, against `generate`.
"""

import collections
import functools
import statistics
from typing import NamedTuple

import harness
import peers
import subjects


class Case(NamedTuple):
    """How many tokens are there, how many are added, and in how many slots."""

    fill: int
    new_tokens: int
    capacity: int

    @classmethod
    def tight(cls, fill, new_tokens):
        """With no more room than needed."""
        return cls(fill, new_tokens, fill + new_tokens + 1)


GPT2_CASES = (
    Case(64, 48, 128),
    Case(32, 64, 1024),
    Case(128, 64, 1024),
    Case(900, 64, 1024),
)
SMOLLM2_CASES = (
    Case.tight(64, 128),
    Case.tight(1024, 128),
    Case(64, 128, 8192),
    # Many tokens, as each call has seconds of prompt before them.
    Case.tight(4096, 384),
)
QUICK_CASES = (Case.tight(24, 16),)  # What the contenders' check has compiled.

# Slots; the scores alone of a layer's prefill take 9 · 8192² · 4 bytes, 2.4 GB.
MOST_FOR_KERAS_HUB = 4608
MEMORY = "memory"


def main():
    options = harness.read_arguments("Times a token of generation at batch 1.")
    report = harness.Report("generation", options)
    read_memory = harness.MemoryReader(options.quick)
    rounds = 2 if options.quick else 3
    runs = ((subjects.gpt2, GPT2_CASES), (subjects.smollm2, SMOLLM2_CASES))
    for make_subject, cases in runs:
        subject = make_subject(options.quick)
        contenders = peers.make_contenders(subject)
        measure_stream(report, subject, 16 if options.quick else 128, rounds)
        for case in QUICK_CASES if options.quick else cases:
            measure(report, subject, contenders, case, rounds, read_memory)
    report.finish()


def measure(report, subject, contenders, case, rounds, read_memory):
    """Adds a row for each contender that can run the case."""
    if case.capacity > MOST_FOR_KERAS_HUB:
        contenders = contenders.copy()
        contenders.pop(peers.KerasHub.name, None)
    per_token, seconds = time_tokens(subject, contenders, case, rounds, read_memory)
    bandwidth = read_memory.nbytes / seconds[MEMORY]
    ours = per_token[peers.Ours.name]
    for name in contenders:
        row = dict(
            model=subject.name,
            contender=name,
            fill=case.fill,
            capacity=case.capacity,
            **{"ms per token": 1e3 * per_token[name]},
            **{"times ours": per_token[name] / ours},
        )
        if name == peers.Ours.name:
            filled = subject.lm.cache_bytes(1, case.fill + case.new_tokens // 2)
            nbytes = harness.weight_bytes(subject.lm) + filled.total
            row["GB/s"] = nbytes / ours / 1e9
            row["of bandwidth"] = nbytes / ours / bandwidth
        report.add(**row)


def time_tokens(subject, contenders, case, rounds, read_memory=None):
    """Times a token and the first token of contenders, in turns.

    Args:
        subject: A `Subject`.
        contenders: Dictionary from names to contenders.
        case: A `Case`.
        rounds: How many turns.
        read_memory: Function that is timed in the same turns, or `None`.

    Returns:
        Two dictionaries from names to medians of seconds: of a token, and of the first
        one, with that of `read_memory` as `MEMORY`.
    """
    prompt = subject.prompt(case.fill)
    functions = {}
    for name, contender in contenders.items():
        functions[name, "one"] = functools.partial(
            contender.first_token, prompt, case.capacity
        )
        functions[name, "many"] = functools.partial(
            contender.many_tokens, prompt, case.new_tokens, case.capacity
        )
    if read_memory is not None:
        functions[MEMORY, "one"] = read_memory
    seconds = harness.time_interleaved(functions, rounds)
    per_token = {}
    for name in contenders:
        pairs = zip(seconds[name, "many"], seconds[name, "one"], strict=True)
        per_token[name] = statistics.median(
            (many - one) / case.new_tokens for many, one in pairs
        )
    first = {
        name: statistics.median(values)
        for (name, what), values in seconds.items()
        if what == "one"
    }
    return per_token, first


def measure_stream(report, subject, new_tokens, rounds):
    """Adds a row for `stream`, whole calls compared with `generate`'s."""
    lm, prompt = subject.lm, subject.prompt(16)
    options = dict(max_new_tokens=new_tokens, stop_token_ids=None)
    lm.room = 1
    functions = {
        "generate": lambda: lm.generate(prompt, **options),
        "stream": lambda: collections.deque(lm.stream(prompt, **options), maxlen=0),
    }
    seconds = harness.time_interleaved(functions, 8 * rounds)
    pairs = zip(seconds["stream"], seconds["generate"], strict=True)
    report.add(
        model=subject.name,
        contender=f"{peers.Ours.name}, stream",
        fill=len(prompt),
        capacity=len(prompt) + new_tokens,
        **{"ms per token": 1e3 * statistics.median(seconds["stream"]) / new_tokens},
        **{"times ours": statistics.median(a / b for a, b in pairs)},
    )


if __name__ == "__main__":
    main()
