"""Which files a call of `generate` goes through before the first product with a weight.

    python benchmarks/path.py

prints the way down to that product, a line a function, and the files that were entered
on the way or beside it, such as for checks and for empty caches. How fast the machine
is doesn't matter.
"""

import sys
from pathlib import Path

import keras_kvcache
from keras_kvcache import DecoderLM
from keras_kvcache.layers import projections

PACKAGE = Path(keras_kvcache.__file__).parent


def main():
    lm = DecoderLM(
        vocabulary_size=31,
        num_layers=2,
        num_query_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=64,
    )
    lm.generate([[1]], max_new_tokens=1)  # Makes the weights and the generator.
    way, entered = trace_to_product(lambda: lm.generate([[1, 2, 3]], max_new_tokens=5))
    print("\n".join(f"{file}: {function}" for file, function in way))
    on_the_way = dict.fromkeys(file for file, _ in way)
    beside = [file for file in entered if file not in on_the_way]
    print(f"\n{len(on_the_way)} files on the way, {len(beside)} beside it:")
    print(", ".join(beside))


def trace_to_product(call):
    """Runs a call, and follows it to the first product with a weight.

    Args:
        call: Function without arguments.

    Returns:
        The pair of the functions that had been entered and not left by then, from the
        outermost on, pairs of a file and a name; and all files that had been entered.
    """
    way, entered = [], {}

    def note(frame, event, _):
        file = file_of(frame)
        if event != "call" or way or file is None:
            return
        entered.setdefault(file)
        if frame.f_code is projections.project.__code__:
            while frame is not None:
                if file_of(frame) is not None:
                    way.insert(0, (file_of(frame), frame.f_code.co_name))
                frame = frame.f_back

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return way, list(entered)


def file_of(frame):
    """The package's file that a frame runs, or `None`."""
    path = Path(frame.f_code.co_filename)
    return str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else None


if __name__ == "__main__":
    main()
