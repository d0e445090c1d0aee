"""How many new tokens a second do ragged batches get?

Prompts of different lengths, 17 to 64 tokens, get 64 new tokens each. Whole calls are
timed, prompts included. keras-hub decodes from the end of the shortest prompt on, all
rows up to the same length; only the 64 tokens count that each row was to get.
transformers pads on the left. In every round one row of ours is timed too, which all
are compared with.

Before anything is timed, rows of ours are generated alone and together; the benchmark
stops unless they are the same.
"""

import functools
import statistics

import harness
import numpy as np
import peers
import subjects

KINDS = (peers.Ours, peers.KerasHub, peers.Transformers)
LENGTHS = np.random.default_rng(0).permutation(np.arange(17, 65)).tolist()
ONE_ROW = "one row"


def main():
    options = harness.read_arguments("Times generation for ragged batches.")
    report = harness.Report("batch_throughput", options)
    new_tokens, rounds = (16, 2) if options.quick else (64, 3)
    subject = subjects.smollm2(options.quick)
    contenders = peers.make_contenders(subject, KINDS, LENGTHS[:3])
    check_alone(subject, contenders[peers.Ours.name], 2 if options.quick else 8)

    for rows in (1, 4) if options.quick else (1, 2, 4, 8, 16, 32):
        functions = {ONE_ROW: contenders[peers.Ours.name]} | contenders
        for name, contender in functions.items():
            lengths = LENGTHS[: 1 if name == ONE_ROW else rows]
            functions[name] = functools.partial(
                contender.generate,
                [subject.prompt(length, seed=length) for length in lengths],
                new_tokens,
                max(lengths) + new_tokens,
            )
        seconds = harness.time_interleaved(functions, rounds)
        one_row = seconds.pop(ONE_ROW)
        for name, theirs in seconds.items():
            ratios = (rows * a / b for a, b in zip(one_row, theirs, strict=True))
            rate = rows * new_tokens / statistics.median(theirs)
            report.add(
                model=subject.name,
                contender=name,
                rows=rows,
                **{"tokens per second": rate},
                **{"times one row of ours": statistics.median(ratios)},
            )
    report.finish()


def check_alone(subject, ours, rows, new_tokens=32):
    """Ends the benchmark unless rows get alone what they get in a batch."""
    prompts = [subject.prompt(length, seed=length) for length in LENGTHS[:rows]]
    capacity = max(map(len, prompts)) + new_tokens
    together = ours.generate(prompts, new_tokens, capacity)
    for prompt, answer in zip(prompts, together, strict=True):
        (alone,) = ours.generate([prompt], new_tokens, capacity)
        if alone != answer:
            raise SystemExit(f"a row alone: {alone}\nthe same in a batch: {answer}")
    print(f"{rows} rows get the same {new_tokens} tokens alone and together")


if __name__ == "__main__":
    main()
