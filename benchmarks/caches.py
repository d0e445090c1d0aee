"""What does each kind of cache make of a token's time and of memory, at batch 1?

Every kind and codec decodes from the same prompt as the exact static cache and holds as
many tokens: the window of a rolling cache is as long as the prompt, so that its ring is
full and each new token takes the place of an old one. The time of a token is that
between the first token of a stream and its last. The order changes from round to
round; the ratio to the exact static cache is the median of the rounds' ratios.
"""

import functools
import statistics

import harness
import subjects

from keras_kvcache.caches import Rolling

EXACT = "static, float32"
CODECS = ("float32", "bfloat16", "int8", "int4")


def main():
    options = harness.read_arguments("Times a token with each kind of cache.")
    report = harness.Report("caches", options)
    fills, new_tokens, rounds = ((24,), 8, 2) if options.quick else ((256, 2048), 64, 5)
    for make_subject in (subjects.gpt2, subjects.smollm2):
        subject = make_subject(options.quick)
        for fill in fills:
            if fill + new_tokens < subject.lm.max_sequence_length:
                measure(report, subject, fill, new_tokens, rounds)
    report.finish()


def measure(report, subject, fill, new_tokens, rounds):
    """Adds a row for each cache that holds `fill` tokens."""
    lm, prompt = subject.lm, subject.prompt(fill)
    lm.room = 1
    kinds = {"static": "static", "rolling": Rolling(fill)}
    caches = {
        f"{name}, {codec}": dict(kind=kind, codec=codec)
        for name, kind in kinds.items()
        for codec in CODECS
    }
    clocks = {
        name: harness.StreamClock(
            functools.partial(
                lm.stream,
                prompt,
                max_new_tokens=1 + new_tokens,
                stop_token_ids=None,
                cache=cache,
            ),
            new_tokens,
        )
        for name, cache in caches.items()
    }
    harness.time_interleaved(clocks, rounds)
    exact = clocks[EXACT].seconds
    for name, clock in clocks.items():
        ratios = (a / b for a, b in zip(clock.seconds, exact, strict=True))
        nbytes = lm.cache_bytes(1, fill + new_tokens + 1, **caches[name]).total
        report.add(
            model=subject.name,
            cache=name,
            fill=fill,
            **{"ms per token": 1e3 * statistics.median(clock.seconds)},
            **{"times exact": statistics.median(ratios)},
            **{"cache, MB": nbytes / 1e6},
        )


if __name__ == "__main__":
    main()
