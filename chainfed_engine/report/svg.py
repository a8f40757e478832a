"""A small SVG writer: a frame with axes and what is drawn into it. In: numbers in data units; out: SVG text.

Colours come from classes (`s0` .. `s7`: one series each, defined by the page for light and dark); each series also has
its own dash and marker, each part its own hatching, so that nothing depends on colour. All text is escaped here.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import TypeVar

WIDTH, HEIGHT = 560, 270
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 44
NUM_STYLES = 8
MAX_POINTS = 600  # more are thinned out: the eye cannot tell, the page stays small
_T = TypeVar("_T")
_DASHES = ("", "7 4", "2 3", "9 3 2 3", "12 4", "4 2", "1 5", "12 3 2 3 2 3")


class Frame:
    """Axes over `x_range` and `y_range`; `y_ticks` None: chosen. Draw with `add` in pixels made by `x` and `y`."""

    def __init__(
        self,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        *,
        x_label: str,
        y_label: str,
        y_ticks: Sequence[tuple[float, str]] | None = None,
        x_ticks: Sequence[tuple[float, str]] | None = None,
        height: int = HEIGHT,
        left: int = LEFT,
        top: int = TOP,
    ) -> None:
        self.height, self.left, self.top = height, left, top
        self._x_range, self._y_range = _widened(x_range), _widened(y_range)
        self._elements: list[str] = []
        self._axes(x_label, y_label, x_ticks, y_ticks)

    def x(self, value: float) -> float:
        low, high = self._x_range
        return self.left + (value - low) / (high - low) * (WIDTH - self.left - RIGHT)

    def y(self, value: float) -> float:
        low, high = self._y_range
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - self.top - BOTTOM)

    def add(self, element: str) -> None:
        self._elements.append(element)

    def line(self, points: Sequence[tuple[float, float]], style: int, name: str, unit: str = "") -> None:
        """A line with markers; a single point is a marker. Each marker tells its values when pointed at."""
        style %= NUM_STYLES
        kept = thinned(points, MAX_POINTS)
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in kept)
        self.add(f'<polyline class="line s{style}" points="{path}" stroke-dasharray="{_DASHES[style]}"/>')
        every = max(1, len(kept) // 24)
        for index, (x, y) in enumerate(kept):
            if index % every == 0 or index == len(kept) - 1:
                label = f"{name}, {number(x)}: {number(y)}{unit}"
                self.add(marker(style, self.x(x), self.y(y), label))

    def reference(self, value: float, label: str, *, below: bool = False, left: bool = False) -> None:
        """A horizontal line across the frame with its name on it (or `below` it), at the right end or the `left`."""
        y = self.y(value)
        below = below or y < self.top + 16
        self.add(f'<line class="limit" x1="{self.left}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        at = y + 13 if below else y - 8  # above the markers of a line that runs along it
        x, anchor = (self.left + 6, "start") if left else (WIDTH - RIGHT - 4, "end")
        self.add(text(x, at, label, anchor, "note"))

    def vertical(self, value: float, label: str, above: int = 0, *, lower: bool = False) -> None:
        """A vertical line with its name beside it (`lower`: clear of a curve along the top), or in the `above`th row
        over the frame."""
        x = self.x(value)
        top = self.top - 18 * above + 4 if above else self.top
        self.add(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{self.height - BOTTOM}"/>')
        left = x > WIDTH * 0.6
        self.add(text(x - 5 if left else x + 5, top + (24 if lower else 9), label, "end" if left else "start", "note"))

    def box(self, x0: float, x1: float, y0: float, y1: float, classes: str, label: str) -> None:
        """A rectangle between two corners in data units."""
        left, right = sorted((self.x(x0), self.x(x1)))
        top, bottom = sorted((self.y(y0), self.y(y1)))
        self.add(rectangle(left, top, right - left, bottom - top, classes, label))

    def svg(self, title: str) -> str:
        return document(self.height, title, "".join(self._elements))

    def _axes(
        self,
        x_label: str,
        y_label: str,
        x_ticks: Sequence[tuple[float, str]] | None,
        y_ticks: Sequence[tuple[float, str]] | None,
    ) -> None:
        right, bottom = WIDTH - RIGHT, self.height - BOTTOM
        for value, label in y_ticks if y_ticks is not None else labelled(*self._y_range):
            y = self.y(value)
            self.add(f'<line class="grid" x1="{self.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            self.add(text(self.left - 7, y + 4, label, "end"))
        for value, label in x_ticks if x_ticks is not None else labelled(*self._x_range, whole=True):
            self.add(text(self.x(value), bottom + 16, label, "middle"))
        self.add(f'<line class="axis" x1="{self.left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        self.add(text((self.left + right) / 2, self.height - 8, x_label, "middle", "label"))
        middle = (self.top + bottom) / 2
        if y_label:
            self.add(
                f'<text class="label" text-anchor="middle" transform="translate(13 {middle:.0f}) rotate(-90)">'
                f"{escape(y_label)}</text>"
            )


def document(height: float, title: str, body: str) -> str:
    """An SVG of the common width; `title` is what a screen reader says."""
    name = escape(title)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{name}" xmlns="http://www.w3.org/2000/svg">'
        f"{body}</svg>"
    )


def rectangle(left: float, top: float, width: float, height: float, classes: str, label: str) -> str:
    return (
        f'<rect class="{classes}" x="{left:.1f}" y="{top:.1f}" width="{max(0.0, width):.1f}" '
        f'height="{max(0.0, height):.1f}"><title>{escape(label)}</title></rect>'
    )


def shortened(name: str, max_chars: int = 19) -> str:
    """A name as it fits beside a frame with `left` of 150."""
    return name if len(name) <= max_chars else name[: max_chars - 1] + "…"


def text(x: float, y: float, content: str, anchor: str = "start", style: str = "tick") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def marker(style: int, x: float, y: float, label: str = "") -> str:
    """One of eight shapes around a pixel."""
    r = 3.6
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"',
        f'<rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r}" height="{2 * r}"',
        f'<path d="M{x:.1f} {y - 4.6:.1f}l4.6 8h-9.2z"',
        f'<path d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5-5z"',
        f'<path d="M{x:.1f} {y + 4.6:.1f}l4.6-8h-9.2z"',
        f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0-8l-8 8"',
        f'<path d="M{x:.1f} {y - 5:.1f}v10m-5-5h10"',
        f'<path d="M{x - 5:.1f} {y:.1f}h10"',
    )
    shape = shapes[style % NUM_STYLES]
    tag = shape[1 : shape.index(" ")]
    return f'{shape} class="marker s{style % NUM_STYLES}"><title>{escape(label)}</title></{tag}>'


def swatch(style: int, *, filled: bool) -> str:
    """The sample of a legend: a filled box (parts) or a line with its marker (series)."""
    style %= NUM_STYLES
    if filled:
        body = f'<rect class="part p{style}" x="1" y="1" width="24" height="12"/>'
    else:
        body = f'<line class="line s{style}" x1="0" x2="26" y1="7" y2="7" stroke-dasharray="{_DASHES[style]}"/>'
        body += marker(style, 13, 7)
    return f'<svg class="swatch" viewBox="0 0 26 14" aria-hidden="true">{body}</svg>'


def patterns() -> str:
    """Fills `p0` .. `p7` of parts: colour under hatching, told apart without colour."""
    hatches = (
        "",
        "M0 8L8 0M-2 2L2 -2M6 10L10 6",
        "M0 0L8 8M-2 6L2 10M6 -2L10 2",
        "M0 2H8M0 6H8",
        "M2 0V8M6 0V8",
        "M0 0L8 8M8 0L0 8",
        "M1 4h2M5 0h2M5 8h2",
        "M0 4H8M4 0V8",
    )
    made = "".join(
        f'<pattern id="h{style}" width="8" height="8" patternUnits="userSpaceOnUse">'
        f'<rect class="s{style} fill" width="8" height="8"/><path class="hatch" d="{hatch}"/></pattern>'
        for style, hatch in enumerate(hatches)
    )
    return f'<svg class="patterns" width="0" height="0" aria-hidden="true"><defs>{made}</defs></svg>'


def ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """Round values from low to high, about `count` of them."""
    step = max(1.0, _step((high - low) / count, (1, 2, 5, 10))) if whole else _step((high - low) / count)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(points: Sequence[_T], at_most: int) -> list[_T]:
    """At most `at_most` of the points, evenly taken, first and last among them."""
    if len(points) <= at_most:
        return list(points)
    return [points[round(index * (len(points) - 1) / (at_most - 1))] for index in range(at_most)]


def number(value: float) -> str:
    """Four significant digits, thousands without an exponent: 0.7148, 12.5, 1240."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.4g}"


def labelled(low: float, high: float, *, whole: bool = False) -> list[tuple[float, str]]:
    """`ticks` with what stands beside them."""
    return [(value, number(round(value, 10))) for value in ticks(low, high, whole=whole)]


def _step(rough: float, factors: Sequence[float] = (1, 2, 2.5, 5, 10)) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in factors if power * factor >= rough * 0.999)


def _widened(limits: tuple[float, float]) -> tuple[float, float]:
    low, high = limits
    return (low, high) if abs(high - low) > 1e-12 * max(1.0, abs(high)) else (low - 0.5, high + 0.5)
