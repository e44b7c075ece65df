"""Line charts as SVG text, without scripts. Colours, dashes and fonts come from the page's style sheet."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise

MAX_POINTS = 400
"""Most points of a curve: more than a figure has pixels for."""
STYLES = 8
"""Pairs of colour and dash that the style sheet has; curve 9 looks like curve 1."""
WIDTH = 400
HEIGHT = 210
LEFT = 48
RIGHT = 12
TOP = 10
BOTTOM = 36
LABEL_GAP = 7
"""Between an axis and its labels."""
DOTTED_UP_TO = 12
"""Curves of no more points have a dot at each."""
PADDING = 0.06
"""Space above the highest and below the lowest value, as a share of their distance."""


@dataclass(frozen=True)
class ChartLine:
    """A line of a chart.

    Attributes:
        name: Its name in the legend.
        points: x and y of each point in the order in which they are joined; y is None where the value is not finite,
            which interrupts the line.
        style: The number of its colour and dash, counted from 0.
        run: Which of several runs it belongs to, counted from 0.
    """

    name: str
    points: tuple[tuple[float, float | None], ...]
    style: int = 0
    run: int = 0

    @property
    def finite(self) -> list[tuple[float, float]]:
        """The points that can be drawn."""
        return [(x, y) for x, y in self.points if y is not None]


@dataclass(frozen=True)
class Chart:
    """Curves over one pair of axes.

    Attributes:
        name: What its identifiers are named after.
        title: What it shows.
        x_label: What its x axis shows.
        unit: The unit of its y axis.
        lines: Its lines.
        x_range: The x axis, where several charts have it in common; None: that of the points.
        diagonal: Whether to draw the line on which y equals x.
    """

    name: str
    title: str
    x_label: str
    unit: str
    lines: tuple[ChartLine, ...]
    x_range: tuple[float, float] | None = None
    diagonal: bool = False


@dataclass(frozen=True)
class Scale:
    """Maps values from `low` to `high` to lengths from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The length of a value."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """The multiples of 1, 2 or 5 times a power of ten in an interval, about `count` of them.

    Args:
        low: Where the interval begins.
        high: Where it ends, above `low`.
        count: How many are wanted.
    """
    step = _tick_step(low, high, count)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _tick_step(low: float, high: float, count: int) -> float:
    """The smallest of 1, 2, 5, 10, … times a power of ten that gives no more than `count` intervals."""
    smallest = (high - low) / count
    power: float = 10.0 ** math.floor(math.log10(smallest))
    factor = next(factor for factor in (1, 2, 5, 10) if factor * power >= smallest * (1 - 1e-9))
    return factor * power


def tick_label(value: float) -> str:
    """A short text of a tick: `0.25`, `1,500`, `20k`, `3e-5`."""
    size = abs(value)
    if size >= 1e9 or 0 < size < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    for unit, length in (("M", 1e6), ("k", 1e3)):
        if size >= 10 * length or (unit == "M" and size >= length):
            return f"{value / length:.12g}{unit}"
    return f"{value:,.12g}"


def thin(curves: Sequence[ChartLine], limit: int = MAX_POINTS) -> list[ChartLine]:
    """Leave out points so that the curves have at most `limit` different x between them.

    The x axis is divided into equal intervals. In each, every curve keeps its lowest, its highest and one value that is
    not finite. A point that one curve keeps, all keep, so that a table has them in one row.

    Args:
        curves: The curves, their points by rising x.
        limit: The largest number of different x, at least 2 and three for each curve.
    """
    every = all_places(curves)
    if len(every) <= limit:
        return list(curves)
    intervals = max(1, (limit - 2) // (3 * len(curves)))
    scale = Scale(min(every), max(every), 0, intervals)
    kept = {min(every), max(every)}
    for curve in curves:
        kept |= _extremes(curve, scale)
    thinned = []
    for curve in curves:
        points = tuple(point for point in curve.points if point[0] in kept)
        thinned.append(replace(curve, points=points))
    return thinned


def all_places(lines: Sequence[ChartLine]) -> set[float]:
    """The x at which any of some lines has a point."""
    places: set[float] = set()
    for line in lines:
        places |= {x for x, _ in line.points}
    return places


def _extremes(curve: ChartLine, scale: Scale) -> set[float]:
    """The x of a curve's lowest, highest and first not finite value in each interval of a scale."""
    lowest: dict[int, tuple[float, float]] = {}
    highest: dict[int, tuple[float, float]] = {}
    gaps: dict[int, float] = {}
    last = int(scale.end) - 1
    for x, y in curve.points:
        interval = min(int(scale(x)), last)
        if y is None:
            gaps.setdefault(interval, x)
            continue
        if interval not in lowest or y < lowest[interval][1]:
            lowest[interval] = (x, y)
        if interval not in highest or y > highest[interval][1]:
            highest[interval] = (x, y)
    extremes = [*lowest.values(), *highest.values()]
    return {x for x, _ in extremes} | set(gaps.values())


def value_range(values: Sequence[float]) -> tuple[float, float]:
    """A range with room around values; around a single value it is a tenth of it, or 1 around zero."""
    low = min(values)
    high = max(values)
    margin = (high - low) * PADDING
    if margin <= abs(high) * 1e-9:
        margin = abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def line_chart(chart: Chart) -> str:
    """Draw a chart.

    Args:
        chart: The chart; at least one of its curves has a point that is finite.

    Returns:
        An `<svg>` element. Its attributes say what the script needs to place a value: `data-plot` where the axes begin
        and end (left, right, top, bottom), `data-x` and `data-y` their ranges.
    """
    name = escape(chart.name)
    x_low, x_high = chart.x_range or _x_range(chart.lines)
    y_low, y_high = _y_range(chart)
    x = Scale(x_low, x_high, LEFT, WIDTH - RIGHT)
    y = Scale(y_low, y_high, HEIGHT - BOTTOM, TOP)
    return "".join(
        (
            f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" ',
            f'aria-labelledby="{name}-title {name}-desc" ',
            f'data-plot="{LEFT} {WIDTH - RIGHT} {TOP} {HEIGHT - BOTTOM}" ',
            f'data-x="{x_low:.9g} {x_high:.9g}" data-y="{y_low:.9g} {y_high:.9g}">',
            f'<title id="{name}-title">{escape(chart.title)}</title>',
            f'<desc id="{name}-desc">{escape(chart_words(chart))}</desc>',
            *_y_axis(y),
            x_axis((x_low, x_high), chart.x_label),
            _diagonal(x, y) if chart.diagonal else "",
            *(_curve(curve, x, y) for curve in chart.lines),
            "</svg>",
        )
    )


def chart_words(chart: Chart) -> str:
    """A chart in words: where each curve begins and ends, its lowest and its highest value."""
    sentences = []
    for curve in chart.lines:
        if curve.finite:
            values = [y for _, y in curve.finite]
            first, last = curve.finite[0], curve.finite[-1]
            sentences.append(
                f"{curve.name}: {first[1]:.4g} at {chart.x_label} {first[0]:.4g}, {last[1]:.4g} at {last[0]:.4g}; "
                f"lowest {min(values):.4g}, highest {max(values):.4g}."
            )
    return " ".join(sentences)


def _x_range(curves: Sequence[ChartLine]) -> tuple[float, float]:
    """From the first to the last x; one on each side where there is only one."""
    places = all_places(curves)
    low = min(places)
    high = max(places)
    return (low, high) if high > low else (low - 1, low + 1)


def _y_range(chart: Chart) -> tuple[float, float]:
    values: list[float] = []
    for line in chart.lines:
        values += [y for _, y in line.finite]
    return value_range(values)


def _y_axis(scale: Scale) -> Iterator[str]:
    """Grid lines with their values. The unit is in the caption of the figure."""
    yield '<g class="grid">'
    for value in ticks(scale.low, scale.high, 5):
        height = scale(value)
        yield f'<path d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text class="y" x="{LEFT - LABEL_GAP}" y="{height + 4:.1f}">{tick_label(value)}</text>'
    yield "</g>"


def x_axis(x_range: tuple[float, float], label: str) -> str:
    """An x axis with its ticks and its label, as a `<g>` element.

    Args:
        x_range: Where it begins and ends.
        label: What it shows.
    """
    scale = Scale(*x_range, LEFT, WIDTH - RIGHT)
    floor = HEIGHT - BOTTOM
    parts = [f'<g class="axis"><path d="M{LEFT} {floor}H{WIDTH - RIGHT}"/>']
    for value in ticks(scale.low, scale.high, 6):
        place = scale(value)
        parts.append(f'<path d="M{place:.1f} {floor}v4"/>')
        parts.append(f'<text x="{place:.1f}" y="{floor + 16}">{tick_label(value)}</text>')
    parts.append(f'<text class="label" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}">{escape(label)}</text></g>')
    return "".join(parts)


def _diagonal(x: Scale, y: Scale) -> str:
    """The part of the line y = x that both axes show."""
    low = max(x.low, y.low)
    high = min(x.high, y.high)
    if high <= low:
        return ""
    return f'<path class="diagonal" d="M{x(low):.1f} {y(low):.1f}L{x(high):.1f} {y(high):.1f}"/>'


def _curve(curve: ChartLine, x: Scale, y: Scale) -> str:
    """The line of a curve, and dots where a point would not show or there are only few."""
    style = curve.style % STYLES
    line = "".join(_segments(curve, x, y))
    dots = "".join(f"M{x(place):.1f} {y(value):.1f}h0" for place, value in _dotted(curve))
    drawn = f'<path class="curve s{style}" data-run="{curve.run}" d="{line}"/>' if "L" in line else ""
    if dots:
        drawn += f'<path class="dots s{style}" data-run="{curve.run}" d="{dots}"/>'
    return drawn


def _segments(curve: ChartLine, x: Scale, y: Scale) -> Iterator[str]:
    is_drawing = False
    for place, value in curve.points:
        if value is not None:
            yield f"{'L' if is_drawing else 'M'}{x(place):.1f} {y(value):.1f}"
        is_drawing = value is not None


def _dotted(curve: ChartLine) -> list[tuple[float, float]]:
    """The points with a dot: all of a few, otherwise those that no line reaches."""
    if len(curve.finite) <= DOTTED_UP_TO:
        return curve.finite
    joined = set()
    for (first, here), (second, there) in pairwise(curve.points):
        if here is not None and there is not None:
            joined |= {first, second}
    return [(x, y) for x, y in curve.finite if x not in joined]
