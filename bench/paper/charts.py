"""Charts that several families use: bars, and rows of small panels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from services.charts.svg import Chart, Scale, number

_WIDTH = 1060


class Bar(NamedTuple):
    """A value with the smallest and the largest of its repetitions."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True, slots=True)
class BarColumn:
    """One value of every entry. limit: end of the axis; None: the largest. strong: a value to mark."""

    title: str
    bars: Sequence[Bar]
    form: Callable[[float], str]
    limit: float | None = None
    strong: float | None = None


def bars(labels: Sequence[tuple[str, str]], columns: Sequence[BarColumn], title: str) -> str:
    """Horizontal bars from 0, columns side by side. labels: name and colour of every entry."""
    left, gap, top_px, pitch, thick = 220, 34, 26, 24, 14
    bottom = top_px + pitch * len(labels)
    width = (_WIDTH - left) / len(columns) - gap
    canvas = Chart(_WIDTH, bottom + 22, Scale(0, 1, 0, 1), Scale(0, 1, 0, 1))
    for index, (name, _) in enumerate(labels):
        canvas.label(left - 10, top_px + index * pitch + thick - 2, name, anchor="end", css="name")
    for place, column in enumerate(columns):
        from_px = left + place * (width + gap)
        most = column.limit or max([column.strong or 0.0, *(bar.high for bar in column.bars)])
        chart = Chart(_WIDTH, bottom, Scale(0.0, 1.08 * most, from_px, from_px + width), Scale(0, 1, bottom, top_px))
        chart.label(from_px, top_px - 10, column.title, css="name strong")
        for tick in chart.x.ticks(5):
            if tick <= most:
                chart.label(chart.x(tick), bottom + 16, column.form(tick), anchor="middle")
        if column.strong is not None:
            chart.marker(column.strong, "")
        for index, (bar, (_, color)) in enumerate(zip(column.bars, labels, strict=True)):
            top = top_px + index * pitch
            chart.boxes([(0.0, bar.middle)], top, thick, color)
            if bar.low < bar.high:
                chart.whisker(bar.low, bar.high, top + thick / 2)
            chart.label(chart.x(bar.high) + 5, top + thick - 2, column.form(bar.middle), css="tick strong")
        canvas.parts += chart.parts
    return canvas.render(title)


class Series(NamedTuple):
    """One line: (x, smallest, middle, largest) per place."""

    label: str
    color: str
    points: Sequence[tuple[float, float, float, float]]


@dataclass(frozen=True, slots=True)
class Panel:
    """One small chart. names: what stands at x 0, 1, ... instead of numbers. limits: of the y axis."""

    title: str
    x_label: str
    series: Sequence[Series]
    form: Callable[[float], str] = number
    names: Sequence[str] = ()
    limits: tuple[float, float] | None = None
    strong: float | None = None


def panels(items: Sequence[Panel], title: str, *, columns: int = 3, height: int = 150) -> str:
    """Panels in rows, each with its own axes."""
    columns = min(columns, len(items))
    left, gap, top_px, foot_px = 62, 20, 26, 46
    pitch = (_WIDTH - gap) / columns
    lines = -(-len(items) // columns)
    canvas = Chart(_WIDTH, lines * (height + top_px + foot_px), Scale(0, 1, 0, 1), Scale(0, 1, 0, 1))
    for index, item in enumerate(items):
        row, column = divmod(index, columns)
        top = row * (height + top_px + foot_px) + top_px
        from_px = column * pitch + left
        canvas.parts += _panel(item, (from_px, (column + 1) * pitch - 4), (top, top + height))
    return canvas.render(title)


def _panel(item: Panel, across: tuple[float, float], down: tuple[float, float]) -> list[str]:
    places = [place for series in item.series for place in series.points]
    low_x, high_x = min(place[0] for place in places), max(place[0] for place in places)
    room = 0.04 * (high_x - low_x) or 0.5
    low, high = item.limits or (0.0, max(1e-9, 1.05 * max(place[3] for place in places)))
    chart = Chart(_WIDTH, 0, Scale(low_x - room, high_x + room, *across), Scale(low, high, down[1], down[0]))
    chart.label((across[0] + across[1]) / 2, down[0] - 9, item.title, anchor="middle", css="name strong")
    for tick in chart.y.ticks(4):
        chart.rule(tick, strong=tick == item.strong)
        chart.label(across[0] - 6, chart.y(tick) + 4, item.form(tick), anchor="end")
    chart.rule(low, strong=True)
    xs = sorted({place[0] for place in places})
    for x in xs:
        chart.label(chart.x(x), down[1] + 16, item.names[round(x)] if item.names else number(x), anchor="middle")
    chart.label((across[0] + across[1]) / 2, down[1] + 33, item.x_label, anchor="middle")
    for series in item.series:
        chart.area([(x, least, most) for x, least, _, most in series.points], series.color)
        chart.line([(x, middle) for x, _, middle, _ in series.points], series.color)
        chart.dots([(x, middle) for x, _, middle, _ in series.points], series.color)
    return chart.parts
