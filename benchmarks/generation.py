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

On an accelerator a Llama of 1.2 billion random parameters in bfloat16 takes the place
of both models. Its tokens may differ by rounding, so contenders must agree on those of
a tiny model in float32 instead. A contender that fails or isn't installed has a row
that says so.

One row of each model is `stream`, which hands over every token, against `generate`.
"""

import collections
import functools
import statistics
import sys
from typing import NamedTuple

import harness
import jax
import peers
import subjects

from keras_kvcache.runtime.platform import is_accelerator


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
# On an accelerator, where a token takes a millisecond.
LLAMA_CASES = (Case.tight(128, 256), Case.tight(4096, 256))
QUICK_CASES = (Case.tight(24, 16),)  # What the contenders' check has compiled.

# Slots; the scores alone of a layer's prefill take 9 · 8192² · 4 bytes, 2.4 GB.
MOST_FOR_KERAS_HUB = 4608
MEMORY = "memory"
ON_ACCELERATOR = (
    peers.Ours,
    peers.HandWrittenJax,
    peers.KerasHub,
    peers.TransformersStatic,
)


def main():
    options = harness.read_arguments("Times a token of generation at batch 1.")
    report = harness.Report("generation", options)
    read_memory = harness.MemoryReader(options.quick)
    rounds = 2 if options.quick else 3
    if is_accelerator() and not options.quick:
        failures = measure_on_accelerator(report, read_memory, rounds)
        report.finish()
        sys.exit("\n".join(failures) if failures else 0)
    add_missing(report, peers.ALL)
    runs = ((subjects.gpt2, GPT2_CASES), (subjects.smollm2, SMOLLM2_CASES))
    for make_subject, cases in runs:
        subject = make_subject(options.quick)
        contenders = peers.make_contenders(subject)
        measure_stream(report, subject, 16 if options.quick else 128, rounds)
        for case in QUICK_CASES if options.quick else cases:
            measure(report, subject, contenders, case, rounds, read_memory)
    report.finish()


def add_missing(report, kinds):
    """Adds a row for each contender whose modules aren't here; the others, a list."""
    there = []
    for kind in kinds:
        if missing := peers.missing_modules(kind):
            reason = f"no module {', '.join(missing)}"
            report.add(contender=kind.name, skipped=reason)
        else:
            there.append(kind)
    return there


def measure_on_accelerator(report, read_memory, rounds):
    """Adds rows for one contender after the other: one that fails costs no other's.

    Returns:
        A list of texts, one for each failure.
    """
    failures, agreeing, expected, ours = [], [], None, {}

    def note(kind, subject, failed):
        failures.append(f"{kind.name}: {failed}"[:300])
        report.add(model=subject.name, contender=kind.name, failed=failed[:300])

    tiny = subjects.llama_1b(quick=True)
    with jax.default_matmul_precision("highest"):
        for kind in add_missing(report, ON_ACCELERATOR):
            try:
                answer = kind(tiny).generate([tiny.prompt(24)], 16, 41)
            except Exception as error:  # The others are still worth timing.
                note(kind, tiny, f"{type(error).__name__}: {error}")
                continue
            expected = expected or answer
            if answer == expected:
                agreeing.append(kind)
            else:
                note(kind, tiny, f"{answer} where the first says {expected}")
    subject = subjects.llama_1b(quick=False)
    for kind in agreeing:
        try:
            contenders = {kind.name: kind(subject)}
            for case in LLAMA_CASES:
                measure(report, subject, contenders, case, rounds, read_memory, ours)
        except Exception as error:
            note(kind, subject, f"{type(error).__name__}: {error}")
    return failures


def measure(report, subject, contenders, case, rounds, read_memory, known=None):
    """Adds a row for each contender that can run the case."""
    if case.capacity > MOST_FOR_KERAS_HUB:
        contenders = contenders.copy()
        contenders.pop(peers.KerasHub.name, None)
    per_token, seconds = time_tokens(subject, contenders, case, rounds, read_memory)
    bandwidth = read_memory.nbytes / seconds[MEMORY]
    known = {} if known is None else known  # our time of each case
    ours = known.setdefault(case, per_token.get(peers.Ours.name, float("nan")))
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
            width = 2 if subject.lm.compute_dtype == "bfloat16" else 4
            nbytes = harness.weight_bytes(subject.lm) * width / 4 + filled.total
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
