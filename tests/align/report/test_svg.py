import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.report.svg import MAX_POINTS, Chart, ChartLine, line_chart, thin, tick_label, ticks, value_range

NOISY = [math.sin(n * 12.9898) * 43758.5453 % 1 for n in range(5000)]


def curve(*values: float | None, name: str = "reward/mean") -> ChartLine:
    return ChartLine(name, tuple(enumerate(values, start=1)))


def chart(*curves: ChartLine, title: str = "Score") -> str:
    return line_chart(Chart(name="figure-score", title=title, x_label="step", unit="score", lines=curves))


def paths(svg: str, kind: str) -> list[str]:
    """What the paths of a class draw."""
    return re.findall(rf'<path class="{kind} [^>]* d="([^"]*)"', svg)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (1, 10, [2, 4, 6, 8, 10]),
        (-0.31, 0.28, [-0.2, 0, 0.2]),
        (0, 30_000, [0, 10_000, 20_000, 30_000]),
        (2e-5, 8e-5, [2e-5, 4e-5, 6e-5, 8e-5]),
        (0.1, 0.3, [0.1, 0.15, 0.2, 0.25, 0.3]),
    ],
)
def test_ticks_are_round_numbers_inside_the_interval(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e12), st.integers(3, 8))
def test_there_are_a_few_ticks_at_equal_distances(low: float, length: float, count: int) -> None:
    if length < abs(low) * 1e-6:
        return
    found = ticks(low, low + length, count)
    assert 1 <= len(found) <= count + 1
    gaps = [second - first for first, second in pairwise(found)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps), rel=1e-3) if gaps else True


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.25, "0.25"), (-3.0, "-3"), (1500.0, "1,500"), (20_000.0, "20k"), (2.5e6, "2.5M"), (3e-5, "3e-5")],
)
def test_labels_of_ticks_are_short(value: float, text: str) -> None:
    assert tick_label(value) == text


def test_few_points_are_all_kept() -> None:
    curves = [curve(*NOISY[:MAX_POINTS]), curve(1.0, None, 2.0)]
    assert thin(curves) == curves


@pytest.mark.parametrize("count", [1, 5])
def test_a_thinned_chart_has_at_most_the_points_that_are_allowed(count: int) -> None:
    thinned = thin([curve(*NOISY[number:]) for number in range(count)])
    assert 50 < len({x for line in thinned for x, _ in line.points}) <= MAX_POINTS


def test_thinning_keeps_the_minimum_the_maximum_and_both_ends() -> None:
    values = [0.5] * 5000
    values[1234] = 9.0
    values[4321] = -9.0
    (thinned,) = thin([curve(*values)])
    assert {(1235, 9.0), (4322, -9.0), (1, 0.5), (5000, 0.5)} <= set(thinned.points)


def test_thinning_keeps_a_value_that_is_not_finite() -> None:
    values: list[float | None] = [*NOISY]
    values[2000] = None
    (thinned,) = thin([curve(*values)])
    assert (2001, None) in thinned.points


def test_what_one_curve_keeps_all_keep() -> None:
    first, second = thin([curve(*NOISY), curve(*reversed(NOISY))])
    assert [x for x, _ in first.points] == [x for x, _ in second.points]


def test_a_chart_is_well_formed_and_its_texts_are_escaped() -> None:
    svg = chart(curve(1.0, 2.0, name="reward/term/<b>&"), title='a < b & "c"')
    root = ElementTree.fromstring(svg)
    assert root.attrib["role"] == "img"
    title, description = root[0], root[1]
    assert root.attrib["aria-labelledby"] == f"{title.attrib['id']} {description.attrib['id']}"
    assert title.text == 'a < b & "c"'
    assert description.text == "reward/term/<b>&: 1 at step 1, 2 at 2; lowest 1, highest 2."


def test_a_value_that_is_not_finite_interrupts_the_line() -> None:
    values: list[float | None] = [float(n) for n in range(20)]
    values[10] = None
    (line,) = paths(chart(curve(*values)), "curve")
    assert line.count("M") == 2
    assert line.count("L") == 17


def test_a_point_between_two_gaps_has_a_dot() -> None:
    values: list[float | None] = [float(n) for n in range(30)]
    values[10] = values[12] = None
    (dots,) = paths(chart(curve(*values)), "dots")
    assert dots.count("M") == 1


def test_a_single_point_has_a_dot_and_lies_in_the_middle() -> None:
    svg = chart(curve(5.0))
    (dot,) = paths(svg, "dots")
    assert re.fullmatch(r"M218\.0 92\.0h0", dot)


@pytest.mark.parametrize(
    ("value", "expected"), [(5.0, (4.5, 5.5)), (0.0, (-1.0, 1.0)), (-2.0, (-2.2, -1.8)), (1e-9, (0.9e-9, 1.1e-9))]
)
def test_a_constant_has_room_around_it(value: float, expected: tuple[float, float]) -> None:
    assert value_range([value, value]) == pytest.approx(expected)


def test_curves_differ_in_style() -> None:
    svg = chart(ChartLine("a", ((1, 1.0), (2, 2.0)), 0), ChartLine("b", ((1, 2.0),), 1))
    assert re.findall(r'class="(?:curve|dots) (s\d)"', svg) == ["s0", "s0", "s1"]


def test_the_highest_value_is_drawn_above_the_lowest() -> None:
    (line,) = paths(chart(curve(0.0, 1.0)), "curve")
    start, end = (float(point.split()[1]) for point in line[1:].split("L"))
    assert start > end


def test_the_diagonal_is_where_both_values_are_equal() -> None:
    equal = ChartLine("a", ((0.5, 0.5), (1.0, 1.0)))
    svg = line_chart(Chart(name="r", title="", x_label="x", unit="", lines=(equal,), diagonal=True))
    diagonal = re.search(r'class="diagonal" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', svg)
    (line,) = paths(svg, "curve")
    assert diagonal
    assert line == f"M{diagonal[1]} {diagonal[2]}L{diagonal[3]} {diagonal[4]}"
