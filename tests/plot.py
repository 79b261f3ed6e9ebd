"""Draw line charts as SVG, with nothing but text: the pictures of the README.

    python tests/plot.py lvmae.jsonl loss.svg     # "is my loss normal?"

The chart of a training has the loss and the cosine over the epochs, and what the
trivial predictors reach as dashed lines.
"""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

COLOURS = ("#1a5fb4", "#c01c28", "#26a269", "#e66100", "#813d9c", "#77767b", "#000000")
WIDTH = 420  # of a chart, in pixels
HEIGHT = 300
LEFT = 52  # margins around the axes
RIGHT = 26
TOP = 28
BOTTOM = 44
LEGEND = 18  # height of a line of the legend, below the axes


@dataclass
class Line:
    """One line of a chart: points (x, y), perhaps with a spread of y."""

    name: str
    xs: list
    ys: list
    spreads: list = field(default_factory=list)
    is_dashed: bool = False


@dataclass
class Chart:
    """Some lines over a common axis."""

    title: str
    x_label: str
    lines: list
    x_ticks: list
    is_log: bool = False


def nice_ticks(low, high):
    """Round numbers, about five, from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    for factor in (1, 2, 5, 10):
        if (high - low) / (factor * step) <= 6:
            break
    step *= factor
    first = math.ceil(low / step)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def text(x, y, words, anchor="middle", colour="#333", size=12):
    """An SVG text."""
    style = f'font-size="{size}" text-anchor="{anchor}" fill="{colour}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'


def draw_chart(chart, left, height, colours):
    """Draw one chart with its left edge at `left` -> a list of SVG elements."""
    ys = [y for line in chart.lines for y in line.ys]
    margin = 0.06 * (max(ys) - min(ys)) or 0.1
    low = min(ys) - margin
    high = max(ys) + margin
    x_low = min(chart.x_ticks)
    x_high = max(chart.x_ticks)

    def place_x(x):
        if chart.is_log:
            share = math.log(x / x_low) / math.log(x_high / x_low)
        else:
            share = (x - x_low) / max(x_high - x_low, 1)  # 1: of a single epoch
        return left + LEFT + share * (WIDTH - LEFT - RIGHT)

    def place_y(y):
        return TOP + (high - y) / (high - low) * (height - TOP - BOTTOM)

    svg = [text(left + WIDTH / 2, 16, chart.title, size=13)]
    for y in nice_ticks(low, high):
        x1 = left + LEFT
        x2 = left + WIDTH - RIGHT
        row = f'y1="{place_y(y):.1f}" y2="{place_y(y):.1f}"'
        svg.append(f'<line x1="{x1}" x2="{x2}" {row} stroke="#ddd"/>')
        svg.append(text(x1 - 6, place_y(y) + 4, f"{y:g}", "end"))
    for x in chart.x_ticks:
        svg.append(text(place_x(x), height - BOTTOM + 18, f"{x:,g}"))
    svg.append(text(left + WIDTH / 2, height - 8, chart.x_label))

    for i, line in enumerate(chart.lines):
        colour = colours[line.name]
        points = list(zip(line.xs, line.ys, strict=True))
        path = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in points)
        dash = 'stroke-dasharray="5 4"' if line.is_dashed else ""
        style = f'fill="none" stroke="{colour}" stroke-width="2" {dash}'
        svg.append(f'<polyline points="{path}" {style}/>')
        for (x, y), spread in zip(points, line.spreads, strict=False):
            column = f'x1="{place_x(x):.1f}" x2="{place_x(x):.1f}"'
            ends = f'y1="{place_y(y - spread):.1f}" y2="{place_y(y + spread):.1f}"'
            svg.append(f'<line {column} {ends} stroke="{colour}"/>')

        x = left + LEFT + (i % 2) * (WIDTH - LEFT) / 2
        y = height + 8 + LEGEND * (i // 2)
        row = f'y1="{y - 4}" y2="{y - 4}"'
        svg.append(f'<line x1="{x}" x2="{x + 22}" {row} {style}/>')
        svg.append(text(x + 28, y, line.name, "start"))
    return svg


def draw(charts, path):
    """Draw charts side by side into an SVG file."""
    colours = {}  # a name has the same one in all charts
    for chart in charts:
        for line in chart.lines:
            colours.setdefault(line.name, COLOURS[len(colours) % len(COLOURS)])
    rows = max(math.ceil(len(chart.lines) / 2) for chart in charts)
    width = WIDTH * len(charts)
    height = HEIGHT + LEGEND * rows + 8
    head = f'width="{width}" height="{height}" font-family="sans-serif"'
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" {head}>']
    svg.append('<rect width="100%" height="100%" fill="white"/>')
    for i, chart in enumerate(charts):
        svg += draw_chart(chart, i * WIDTH, HEIGHT, colours)
    svg.append("</svg>")
    Path(path).write_text("\n".join(svg) + "\n")


def read_log(path):
    """Charts of loss and of cosine over the epochs, from a log of train.py."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
        epochs = [line for line in lines if "epoch" in line]
        last = epochs[-1]
    except (OSError, ValueError, IndexError) as error:
        raise SystemExit(
            f"{path}: found {error!r}, expected a log of train.py"
        ) from None
    trivial = [line for line in lines if "predictor" in line]
    xs = [line["epoch"] for line in epochs]
    step = max(1, round(xs[-1] / 4))
    ticks = sorted({1, *range(step, xs[-1] + 1, step)})
    charts = []
    for title, keys in (
        ("loss", {"training": "loss", "validation": "val_loss"}),
        ("cosine", {"validation": "cosine"}),
    ):
        keys = {name: key for name, key in keys.items() if key in last}
        if not keys:  # without validation there is no cosine
            continue
        chart = Chart(f"{title} of the masked segments", "epoch", [], ticks)
        for name, key in keys.items():
            ys = [line[key] for line in epochs]
            chart.lines.append(Line(name, xs, ys))
        for line in trivial:
            y = line[list(keys.values())[-1]]
            ends = [xs[0], xs[-1]]
            chart.lines.append(Line(line["predictor"], ends, [y, y], is_dashed=True))
        charts.append(chart)
    return charts


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    draw(read_log(sys.argv[1]), sys.argv[2])
