"""Small charts as inline SVG. Colours come from CSS variables of the page, so that light and dark both work."""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Point = tuple[float, float]

_MAX_LOG_TICKS = 9
#: Opacity of a faded cell over that of another.
_FADED = 0.3


def text(value: object) -> str:
    """Escaped for HTML and SVG."""
    return html.escape(str(value), quote=True)


@dataclass(frozen=True, slots=True)
class Scale:
    """Data to pixels, linear or logarithmic."""

    low: float
    high: float
    from_px: float
    to_px: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of a value; values outside the range land on its edge."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(at)
        share = (at - low) / (high - low) if high > low else 0.0
        return self.from_px + share * (self.to_px - self.from_px)

    def ticks(self, count: int = 6) -> list[float]:
        """Round values inside the range."""
        if self.log:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in ((1, 2, 5), (1, 3), (1,)):
                values = [factor * 10.0**exponent for exponent in exponents for factor in factors]
                inside = [value for value in values if self.low <= value <= self.high]
                if len(inside) <= _MAX_LOG_TICKS:
                    break
            return inside
        if self.high <= self.low:
            return [self.low]
        raw = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A short plain form: 3 significant digits, no exponent for everyday sizes."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


@dataclass(slots=True)
class Chart:
    """A plot area with axes; shapes are added in drawing order."""

    width: int
    height: int
    x: Scale
    y: Scale
    parts: list[str] = field(default_factory=list)

    @classmethod
    def plot(
        cls,
        width: int,
        height: int,
        x_range: Point,
        y_range: Point,
        *,
        log_x: bool = False,
        margins: tuple[int, int, int, int] = (26, 12, 40, 52),
    ) -> "Chart":
        """An empty chart; margins are top, right, bottom, left in pixels."""
        top, right, bottom, left = margins
        return cls(
            width,
            height,
            Scale(*x_range, left, width - right, log_x),
            Scale(*y_range, height - bottom, top),
        )

    def axes(self, x_label: str, y_label: str, *, y_percent: bool = False) -> None:
        """Grid, tick labels and axis names."""
        left, right = self.x.from_px, self.x.to_px
        bottom, top = self.y.from_px, self.y.to_px
        for value in self.y.ticks(5):
            at = self.y(value)
            label = f"{100 * value:.0f} %" if y_percent else number(value)
            self.parts.append(f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
            self.label(left - 7, at + 4, label, anchor="end")
        for value in self.x.ticks():
            at = self.x(value)
            self.parts.append(
                f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom:.1f}" y2="{bottom + 4:.1f}"/>'
            )
            self.label(at, bottom + 17, number(value), anchor="middle")
        self.parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        self.label((left + right) / 2, bottom + 34, x_label, anchor="middle", css="name")
        self.label(left - 44, top - 13, y_label, anchor="start", css="name")

    def label(self, x: float, y: float, content: str, *, anchor: str = "start", css: str = "tick") -> None:
        """Text at pixels."""
        self.parts.append(f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text(content)}</text>')

    def line(self, points: Sequence[Point], color: str, *, dashed: bool = False, dash_px: float = 5.0) -> None:
        """A line through data points; dash_px: length of a dash."""
        if not points:
            return
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        dash = f' stroke-dasharray="{dash_px:g} 4"' if dashed else ""
        self.parts.append(f'<polyline class="line" style="stroke:{color}"{dash} points="{path}"/>')

    def area(self, points: Sequence[tuple[float, float, float]], color: str) -> None:
        """What lies between two lines over the same x: (x, low, high), in data units."""
        if not points:
            return
        edge = [(x, high) for x, _, high in points] + [(x, low) for x, low, _ in reversed(points)]
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in edge)
        self.parts.append(f'<polygon class="area" style="fill:{color}" points="{path}"/>')

    def dots(self, points: Iterable[Point], color: str) -> None:
        """Marks at data points, one path for all."""
        path = "".join(f"M{self.x(x):.1f} {self.y(y):.1f}h0" for x, y in points)
        if path:
            self.parts.append(f'<path class="dots" style="stroke:{color}" d="{path}"/>')

    def beyond(self, points: Iterable[Point], color: str) -> None:
        """Triangles at the upper or lower edge of the plot, for data points that lie outside its y range."""
        path = ""
        for x, y in points:
            at, edge, inward = self.x(x), self.y(y), 8.0 if y > self.y.high else -8.0
            path += f"M{at:.1f} {edge:.1f}l-4 {inward:.1f}h8z"
        if path:
            self.parts.append(f'<path class="beyond" style="fill:{color}" d="{path}"/>')

    def rule(self, value: float, *, strong: bool = False) -> None:
        """A horizontal line at a data value."""
        left, right, at = self.x.from_px, self.x.to_px, self.y(value)
        css = "axis" if strong else "grid"
        self.parts.append(f'<line class="{css}" x1="{left:.1f}" x2="{right:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')

    def cell(
        self, left: float, top: float, width: float, height: float, content: str, strength: float, *, faded: bool
    ) -> None:
        """A cell of a heat map, at pixels. strength: -1 (worst, red) over 0 (neutral) to 1 (best, blue).

        faded: pale, for a value that says little.
        """
        color = "#1f6fb5" if strength >= 0 else "#c0392b"
        opacity = min(1.0, abs(strength)) * (_FADED if faded else 1.0)
        ink = "var(--soft)" if faded else "#fff" if opacity > 0.55 else "var(--ink)"
        self.parts.append(
            f'<rect class="track" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
            f'<rect style="fill:{color};opacity:{opacity:.2f}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}"/><text class="cell" style="fill:{ink}" x="{left + width / 2:.1f}" '
            f'y="{top + height / 2 + 4:.1f}" text-anchor="middle">{text(content)}</text>'
        )

    def marker(self, value: float, content: str, *, low: bool = False) -> None:
        """A named vertical line at a data value; the name is at its top or low at its foot."""
        at, top, bottom = self.x(value), self.y.to_px, self.y.from_px
        self.parts.append(f'<line class="marker" x1="{at:.1f}" x2="{at:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>')
        self.label(at + 5, bottom - 8 if low else top + 12, content, css="tick strong")

    def band(self, begin: float, end: float, content: str) -> None:
        """A shaded, named stretch of the x axis."""
        left, right = self.x(begin), self.x(end)
        top, bottom = self.y.to_px, self.y.from_px
        self.parts.append(
            f'<rect class="band" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}"/>'
        )
        self.label(left + 5, top + 12, content, css="tick strong")

    def boxes(self, intervals: Iterable[Point], top_px: float, height_px: float, color: str) -> None:
        """Many boxes of one colour between x values: one path, so that thousands stay small."""
        path = "".join(
            f"M{left:.1f} {top_px:.1f}h{max(0.4, right - left):.1f}v{height_px:.1f}H{left:.1f}z"
            for left, right in ((self.x(begin), self.x(end)) for begin, end in intervals)
        )
        if path:
            self.parts.append(f'<path style="fill:{color}" d="{path}"/>')

    def whisker(self, low: float, high: float, at_px: float) -> None:
        """A thin horizontal line from x value to x value, at a height in pixels."""
        left, right = self.x(low), self.x(high)
        self.parts.append(f'<line class="whisker" x1="{left:.1f}" x2="{right:.1f}" y1="{at_px:.1f}" y2="{at_px:.1f}"/>')

    def frame(self, top_px: float, height_px: float) -> None:
        """The empty track behind a row of boxes."""
        left, right = self.x.from_px, self.x.to_px
        self.parts.append(
            f'<rect class="track" x="{left:.1f}" y="{top_px:.1f}" width="{right - left:.1f}" height="{height_px:.1f}"/>'
        )

    def render(self, title: str) -> str:
        """The SVG element; `title` is read out by screen readers."""
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{text(title)}">'
            + "".join(self.parts)
            + "</svg>"
        )


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Colour keys: (name, colour)."""
    items = "".join(
        f'<span class="key"><i style="background:{color}"></i>{text(name)}</span>' for name, color in entries
    )
    return f'<div class="legend">{items}</div>'
