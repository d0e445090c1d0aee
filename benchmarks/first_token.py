"""How long does a prompt take until its first new token?

All programs are warm. With room for little more than the prompt this is the time of
prefill. keras-hub runs as many prompt tokens as there is room for, whatever the prompt
is, and then decodes until the room is full: its first token costs what a prompt costs
that leaves room for a single one, and that is what is timed.
"""

import functools
import statistics

import harness
import peers
import subjects

# Lengths of prompts, and the room asked for.
GPT2_CASES = ((32, 1024), (896, 897))
SMOLLM2_CASES = ((32, 32 + 1024), (128, 129), (512, 513), (1024, 1025), (4096, 4097))
QUICK_CASES = ((24, 41),)  # What the contenders' check has compiled.


def main():
    options = harness.read_arguments("Times the first token of prompts.")
    report = harness.Report("first_token", options)
    rounds = 2 if options.quick else 3
    runs = ((subjects.gpt2, GPT2_CASES), (subjects.smollm2, SMOLLM2_CASES))
    for make_subject, cases in runs:
        subject = make_subject(options.quick)
        contenders = peers.make_contenders(subject)
        for length, capacity in QUICK_CASES if options.quick else cases:
            prompt = subject.prompt(length)
            functions = {
                name: functools.partial(contender.first_token, prompt, capacity)
                for name, contender in contenders.items()
            }
            seconds = harness.time_interleaved(functions, rounds)
            ours = seconds[peers.Ours.name]
            for name, theirs in seconds.items():
                ratios = (a / b for a, b in zip(theirs, ours, strict=True))
                report.add(
                    model=subject.name,
                    contender=name,
                    prompt=length,
                    capacity=capacity,
                    ms=1e3 * statistics.median(theirs),
                    **{"times ours": statistics.median(ratios)},
                )
    report.finish()


if __name__ == "__main__":
    main()
