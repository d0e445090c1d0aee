"""What all benchmarks share: interleaved timing, the machine, tables, JSON lines."""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path

# PyTorch for CUDA imports it late, and once TensorFlow is there that kills the process.
with contextlib.suppress(ImportError):
    import triton as _  # noqa: F401

RESULTS = Path(__file__).parent / "results"
# Seconds before a call is timed: a stream that was left has its next step under way.
PAUSE = 0.1
PACKAGES = ("keras", "jax", "keras-hub", "transformers", "torch", "llama-cpp-python")


def read_arguments(description, **choices):
    """The options of every benchmark: `--quick` and `--output`.

    Args:
        description: What the benchmark does.
        **choices: The benchmark's own arguments, each with its allowed values.
    """
    parser = argparse.ArgumentParser(description=description)
    for name, values in choices.items():
        parser.add_argument(name, choices=values)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, for a look that it runs"
    )
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder for the JSON lines"
    )
    return parser.parse_args()


def time_interleaved(functions, repeats):
    """Times functions in turns, so that a slow moment of the machine hits all.

    Args:
        functions: Dictionary from names to functions without arguments that
            return when their work is done. Each is first called once untimed. What
            has a `prepare` has it called before each time.
        repeats: How many rounds.

    Returns:
        A dictionary from names to lists of seconds, one a round.
    """
    seconds = {name: [] for name in functions}
    for function in functions.values():
        function()
    for round_ in range(repeats):
        # Alternate the order: what runs after whom matters to caches and clocks.
        for name in list(functions)[:: 1 if round_ % 2 == 0 else -1]:
            time.sleep(PAUSE)
            getattr(functions[name], "prepare", lambda: None)()
            begin = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def median_seconds(functions, repeats):
    """The medians of `time_interleaved`."""
    seconds = time_interleaved(functions, repeats)
    return {name: statistics.median(values) for name, values in seconds.items()}


class StreamClock:
    """Calls a stream again and again, and notes what a token takes.

    The first call is for warming up and isn't noted.

    Args:
        stream: Function without arguments that gives a generator of tokens, one more
            than are timed.
        new_tokens: How many are timed, from the first on.

    Attributes:
        seconds: Of a token, one number a call.
    """

    def __init__(self, stream, new_tokens):
        self._stream, self._new_tokens = stream, new_tokens
        self._is_warm, self.seconds = False, []

    def __call__(self):
        tokens = self._stream()
        next(tokens)
        begin = time.perf_counter()
        for _ in range(self._new_tokens):
            next(tokens)
        seconds = time.perf_counter() - begin
        if self._is_warm:
            self.seconds.append(seconds / self._new_tokens)
        self._is_warm = True


class MemoryReader:
    """Reads memory with all cores together when called, by summing a buffer.

    Args:
        quick: Whether the buffer may be small; else no processor's cache holds it.

    Attributes:
        nbytes: What a call reads.
    """

    def __init__(self, quick):
        import jax
        import jax.numpy as jnp

        # A gigabyte takes a CPU 50 ms, but an accelerator too little to be timed.
        large = 2**30 if jax.default_backend() == "cpu" else 2**32
        self.nbytes = 2**26 if quick else large
        self._buffer = jnp.ones(self.nbytes // 4, jnp.float32)
        self._sum = jax.jit(jnp.sum)

    def __call__(self):
        self._sum(self._buffer).block_until_ready()

    # Where others share the machine, memory that was left alone for minutes may be read
    # at less than half its speed the first time.
    prepare = __call__


def weight_bytes(lm):
    """Bytes of float32 weights that a step of one row can't do without.

    Of a position table it needs a single row, as it does of an embedding that the
    logits aren't made with, and of experts those that it chose.
    """
    config, total = lm.get_config(), 0
    is_tied = not any("reverse_embeddings" in weight.path for weight in lm.weights)
    for weight in lm.weights:
        nbytes = 4 * math.prod(weight.shape)
        if "/experts/" in weight.path:
            nbytes = nbytes * config["num_experts_per_token"] // config["num_experts"]
        is_looked_up = weight.path.endswith("position_embedding/embeddings") or (
            weight.path.endswith("token_embedding/embeddings") and not is_tied
        )
        total += 0 if is_looked_up else nbytes
    return total


class Report:
    """Rows of one benchmark: a table on standard output, JSON lines in a file.

    Args:
        name: Name of the benchmark, of its file `<name>.jsonl` too.
        options: What `read_arguments` gave.
    """

    def __init__(self, name, options):
        self.name = name
        self._rows = []
        suffix = "-quick" if options.quick else ""
        self._path = options.output / f"{name}{suffix}.jsonl"
        self._context = {
            "machine": describe_machine(),
            "date": datetime.date.today().isoformat(),
            "versions": _versions(),
        }

    def add(self, **row):
        """Adds a row; it's shown and kept at once, as a long run may be cut short."""
        self._rows.append(row)
        shown = ", ".join(f"{key}={_format(value)}" for key, value in row.items())
        print(f"# {shown}", file=sys.stderr, flush=True)
        lines = [row]
        if len(self._rows) == 1:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.unlink(missing_ok=True)
            lines.insert(0, {"benchmark": self.name, **self._context})
        with open(self._path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def finish(self):
        """Prints the table."""
        columns = list(dict.fromkeys(key for row in self._rows for key in row))
        cells = [[_format(row.get(key, "")) for key in columns] for row in self._rows]
        print(f"\n{self.name}: {self._context['machine']}\n")
        for line in markdown_table(columns, cells):
            print(line)


def read_results(path):
    """The context and the rows that a `Report` wrote."""
    context, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return context, rows


def markdown_table(columns, cells):
    """Lines of a table whose columns are aligned."""
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for row in (columns, ["-" * width for width in widths], *cells):
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "| " + " | ".join(padded) + " |"


def describe_machine():
    """What the benchmark ran on, in a line."""
    import jax

    accelerator = jax.devices()[0]
    if accelerator.platform != "cpu":
        return f"{accelerator.device_kind}, {platform.machine()} host"
    return f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {platform.system()}"


def _processor():
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def _versions():
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _format(value):
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)
