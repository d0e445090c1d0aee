"""Draws what the other benchmarks wrote: `results/*.jsonl` to `figures/*.png`.

`--output` is the folder of the results; `figures` lies beside it. With `--quick` the
results of quick runs are drawn. What wasn't run is skipped with a line that says so.
"""

from collections.abc import Callable
from typing import NamedTuple

import harness
import matplotlib

matplotlib.use("Agg")  # Draws into files, without a screen.
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

# Colours of Okabe and Ito, told apart by the colour-blind too. A contender has the same
# one in all figures.
BLUE, SKY, ORANGE, GREEN = "#0072B2", "#56B4E9", "#E69F00", "#009E73"
VERMILION, PURPLE, BLACK, GREY = "#D55E00", "#CC79A7", "#000000", "#888888"
STYLES = {
    "keras-kvcache": (BLUE, "o"),
    "keras-kvcache, head-major": (BLUE, "o"),
    "keras-kvcache, dense": (SKY, "s"),
    "keras-kvcache, random weights": (SKY, "s"),
    "keras-hub": (VERMILION, "D"),
    "keras-hub, random weights": (VERMILION, "D"),
    "hand-written JAX": (BLACK, "x"),
    "transformers": (GREEN, "^"),
    "transformers, static cache": (ORANGE, "v"),
    "llama.cpp, Q4_1 weights": (PURPLE, "P"),
}
WIDTH, HEIGHT, DOTS = 8, 4.8, 150  # inches, and dots an inch: 1200 x 720 pixels


class Figure(NamedTuple):
    """A question, and what of which results answers it."""

    benchmark: str  # whose results are drawn
    title: str
    draw: Callable  # (axes, rows, figure): draws one panel
    x: tuple  # column, or columns, of the horizontal axis, and its label
    y: str  # column of the vertical axis, and its label; empty for bars
    panels: tuple = ()  # columns; each of their values gets a panel
    choose: Callable = list  # rows -> rows that a panel shows
    aspect: str = ""  # what tells the file from others of the benchmark


def main():
    options = harness.read_arguments("Draws the results that there are.")
    suffix = "-quick" if options.quick else ""
    folder = options.output.parent / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for figure in FIGURES:
        results = options.output / f"{figure.benchmark}{suffix}.jsonl"
        path = folder / f"{figure.benchmark}{figure.aspect}{suffix}.png"
        if results.exists():
            save(figure, *harness.read_results(results), path)
            print(path)
        else:
            print(f"{path.name} is skipped: there is no {results}")


def save(figure, context, rows, path):
    """Draws a figure, panel by panel, into a file."""
    measured = (row for row in rows if not {"skipped", "failed"} & row.keys())
    panels = group(measured, figure.panels)
    panels = {values: figure.choose(chosen) for values, chosen in panels.items()}
    panels = {values: chosen for values, chosen in panels.items() if chosen}
    size = dict(figsize=(WIDTH, HEIGHT), layout="constrained")
    canvas, (grid,) = plt.subplots(1, len(panels), squeeze=False, sharey=True, **size)
    handles = {}
    for axes, (values, chosen) in zip(grid, panels.items(), strict=True):
        figure.draw(axes, chosen, figure)
        pairs = zip(figure.panels, values, strict=True)
        parts = [v if k == "model" else f"{k}={v}" for k, v in pairs]
        axes.set_title(", ".join(parts), fontsize="medium")
        axes.set_xlabel(figure.x[1])
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        handles |= {line.get_label(): line for line in axes.get_lines()}
    grid[0].set_ylabel(figure.y)
    place = dict(loc="outside lower center", borderaxespad=1.5)
    canvas.legend(handles.values(), handles.keys(), ncols=3, frameon=False, **place)
    canvas.suptitle(figure.title)
    canvas.get_layout_engine().set(rect=(0, 0.045, 1, 0.955))
    canvas.text(0.5, 0.01, context["machine"], ha="center", fontsize="x-small")
    canvas.savefig(path, dpi=DOTS)
    plt.close(canvas)


def draw_lines(axes, rows, figure):
    """A line a contender over a column of numbers, both axes logarithmic."""
    x, _ = figure.x
    for (name,), points in group(rows, ["contender"]).items():
        points = sorted((row[x], row[figure.y]) for row in points)
        axes.plot(*zip(*points, strict=True), label=name, **style_of(name))
    axes.set_xscale("log", base=2)
    ticks = sorted({row[x] for row in rows})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize="small")
    axes.xaxis.set_minor_locator(NullLocator())
    plain_log_scale(axes)


def draw_memory(axes, rows, figure):
    """Lines, and what the cache itself takes."""
    draw_lines(axes, rows, figure)
    points = sorted({(row["capacity"], row["cache MB"]) for row in rows})
    label = "keys and values as such"
    axes.plot(*zip(*points, strict=True), color=GREY, linestyle=":", label=label)


def draw_cases(axes, rows, figure):
    """A dot a contender for each pair of two columns, one `of` the other."""
    columns, _ = figure.x
    cases = sorted(group(rows, columns))
    for (name,), points in group(rows, ["contender"]).items():
        places = [
            cases.index(tuple(row[column] for column in columns)) for row in points
        ]
        heights = [row[figure.y] for row in points]
        style = style_of(name) | dict(linestyle="", markersize=8, alpha=0.85)
        axes.plot(places, heights, label=name, **style)
    labels = [f"{first:,}\nof {second:,}" for first, second in cases]
    axes.set_xticks(range(len(cases)), labels, fontsize="small")
    axes.margins(x=0.1)
    plain_log_scale(axes)


def draw_stages(axes, rows, figure):
    """A bar a start, its stages one after the other."""
    names = [f"{row['contender']}\n{row['start']} start" for row in rows]
    colours = [style_of(row["contender"])["color"] for row in rows]
    ends, narrow = [0] * len(rows), 0.1 * max(row["in all s"] for row in rows)
    for stage, alpha in zip(figure.x[0], (1, 0.7, 0.4), strict=True):
        seconds = [row[stage] for row in rows]
        bars = axes.barh(names, seconds, left=ends, color=colours, alpha=alpha)
        label = stage.removesuffix(" s")
        labels = [label if width > narrow else "" for width in seconds]
        axes.bar_label(bars, labels, label_type="center", fontsize="small")
        ends = [end + more for end, more in zip(ends, seconds, strict=True)]
    axes.bar_label(bars, [f"{row['in all s']:.1f} s" for row in rows], padding=4)
    axes.margins(x=0.12)
    axes.invert_yaxis()


def style_of(contender):
    colour, marker = STYLES.get(contender, (GREY, "*"))
    return dict(color=colour, marker=marker)


def group(rows, columns):
    """A dictionary from values of the columns to the rows that have them."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def plain_log_scale(axes):
    """A logarithmic vertical axis with numbers that aren't powers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def at_largest_capacity(rows):
    rows = [row for row in rows if row["index"] == "shared"]
    largest = max(row["capacity"] for row in rows)
    return [row for row in rows if row["capacity"] == largest]


def at_smallest_fill(rows):
    """Of attention of which several capacities were measured."""
    smallest = min(row["fill"] for row in rows)
    rows = [row for row in rows if row["fill"] == smallest]
    return rows if len({row["capacity"] for row in rows}) > 1 else []


def without_stream(rows):
    """Its row has a case of its own."""
    return [row for row in rows if not row["contender"].endswith(", stream")]


SHAPE = ("B", "N", "K")
FIGURES = (
    Figure(
        "attention_step",
        "What does a decode step of attention cost as its cache fills?",
        draw_lines,
        ("fill", "slots filled"),
        "ms per step",
        SHAPE,
        at_largest_capacity,
        "_by_fill",
    ),
    Figure(
        "attention_step",
        "What does a decode step of attention cost as its cache has more room?",
        draw_lines,
        ("capacity", "capacity in slots, 256 filled"),
        "ms per step",
        SHAPE,
        at_smallest_fill,
        "_by_capacity",
    ),
    Figure(
        "generation",
        "What does a token cost?",
        draw_cases,
        (("fill", "capacity"), "slots filled, of slots asked for"),
        "ms per token",
        ("model",),
        without_stream,
    ),
    Figure(
        "first_token",
        "How long does a prompt take until its first new token?",
        draw_cases,
        (("prompt", "capacity"), "prompt tokens, of slots asked for"),
        "ms",
        ("model",),
    ),
    Figure(
        "batch_throughput",
        "How many new tokens a second do ragged batches get?",
        draw_lines,
        ("rows", "rows"),
        "tokens per second",
        ("model",),
    ),
    Figure(
        "cold_start",
        "How long from starting Python to the first token?",
        draw_stages,
        (("import s", "model s", "first token s"), "seconds"),
        "",
    ),
    Figure(
        "memory",
        "How much memory does decoding take beyond the weights?",
        draw_memory,
        ("capacity", "capacity in slots"),
        "peak MB",
    ),
)

if __name__ == "__main__":
    main()
