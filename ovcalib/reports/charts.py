"""Charts as inline SVG: no script, colours from the page's style sheet, and the figures again in a text alternative."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

WIDTH = 640
LEFT = 8
_numbers = itertools.count(1)


def svg(title: str, description: str, height: float, body: Sequence[Markup]) -> Markup:
    """An image that screen readers read as its title and description."""
    number = next(_numbers)
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-labelledby="t{} d{}">'
        '<title id="t{}">{}</title><desc id="d{}">{}</desc>{}</svg>'
    ).format(WIDTH, f"{height:g}", number, number, number, title, number, description, Markup("").join(body))


def text(x: float, y: float, value: str, css: str = "", anchor: str = "start") -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}" class="{}">{}</text>').format(
        f"{x:.1f}", f"{y:.1f}", anchor, css, value
    )


def rect(x: float, y: float, width: float, height: float, css: str) -> Markup:
    return Markup('<rect x="{}" y="{}" width="{}" height="{}" class="{}"/>').format(
        f"{x:.1f}", f"{y:.1f}", f"{max(width, 0):.1f}", f"{max(height, 0):.1f}", css
    )


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    return Markup('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>').format(
        f"{x1:.1f}", f"{y1:.1f}", f"{x2:.1f}", f"{y2:.1f}", css
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two bounds."""
    span = high - low
    if not span > 0:
        return [low]
    step = 10 ** math.floor(math.log10(span / count))
    step *= min((m for m in (1, 2, 5, 10) if span / (step * m) <= count), default=10)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]


def intervals(title: str, rows: Sequence[tuple[str, float, float, float]], unit: str) -> Markup:
    """Values with their 95 % intervals, one under the other.

    rows   (label, value, low, high)
    """
    low, high = min(r[2] for r in rows), max(r[3] for r in rows)
    margin = 0.08 * (high - low) or 1.0
    low, high = low - margin, high + margin
    left, right = 70.0, WIDTH - 20.0

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    height = 34 * len(rows) + 30
    body = [line(x(t), 4, x(t), height - 22, "grid") for t in ticks(low, high)]
    body += [text(x(t), height - 6, f"{t:g}", "tick", "middle") for t in ticks(low, high)]
    for i, (label, value, lower, upper) in enumerate(rows):
        y = 22 + 34 * i
        css = f"s{i % 4}"
        body += [
            text(LEFT, y + 4, label, "label"),
            line(x(lower), y, x(upper), y, f"whisker {css}"),
            Markup('<circle cx="{}" cy="{}" r="6" class="dot {}"/>').format(f"{x(value):.1f}", y, css),
        ]
    described = "; ".join(
        f"{label}: {value:.4g} {unit} ({lower:.4g} to {upper:.4g})" for label, value, lower, upper in rows
    )
    return svg(title, described, height, body)


def bars(title: str, rows: Sequence[tuple[str, float]], unit: str, logarithmic: bool = False) -> Markup:
    """Horizontal bars with their labels above, so that long names fit a narrow screen."""
    positive = [value for _, value in rows if value > 0]
    top = max(positive, default=1.0)
    floor = min(positive, default=top) / 2 if logarithmic else 0.0

    def width(value: float) -> float:
        if not logarithmic:
            return value / top * (WIDTH - 120)
        if value <= 0:
            return 0.0
        return math.log(value / floor) / math.log(top / floor) * (WIDTH - 120) if top > floor else WIDTH - 120

    body = []
    for i, (label, value) in enumerate(rows):
        y = 34 * i
        body += [
            text(LEFT, y + 13, label, "label"),
            rect(LEFT, y + 18, max(width(value), 1.5), 10, "bar"),
            text(LEFT + max(width(value), 1.5) + 8, y + 27, f"{value:.3g}", "tick"),
        ]
    scale = " (logarithmic scale)" if logarithmic else ""
    described = "; ".join(f"{label}: {value:.3g} {unit}" for label, value in rows)
    return svg(f"{title}{scale}", described, 34 * len(rows) + 4, body)


def steps(title: str, series: Mapping[str, tuple[Sequence[float], Sequence[int], float]], unit: str) -> Markup:
    """Histograms over one axis, each with its median.

    series   name -> (edges, counts, median); heights are relative to each histogram's own peak
    """
    low = min(edges[0] for edges, _, _ in series.values())
    high = max(edges[-1] for edges, _, _ in series.values())
    # One slow tail must not squeeze everything else into a corner.
    high = min(high, 3 * max(median for _, _, median in series.values()))
    if not high > low:
        high = low + 1e-6
    height, bottom = 200.0, 164.0

    def x(value: float) -> float:
        return LEFT + (min(value, high) - low) / (high - low) * (WIDTH - 2 * LEFT)

    body = [text(x(t), height - 16, f"{t:g}", "tick", "middle") for t in ticks(low, high)]
    body.append(text(WIDTH - LEFT, height - 2, unit, "tick", "end"))
    body.append(line(LEFT, bottom, WIDTH - LEFT, bottom, "axis"))
    for i, (name, (edges, counts, median)) in enumerate(series.items()):
        density = [c / max(b - a, 1e-12) for a, b, c in zip(edges, edges[1:], counts, strict=False)]
        peak = max(density) or 1
        points = [f"M{x(edges[0]):.1f} {bottom}"]
        for a, b, d in zip(edges, edges[1:], density, strict=False):
            if a > high:
                break
            level = bottom - d / peak * 126
            points.append(f"L{x(a):.1f} {level:.1f}L{x(b):.1f} {level:.1f}")
        points.append(f"L{x(edges[-1]):.1f} {bottom}Z")
        body.append(Markup('<path d="{}" class="area s{}"/>').format("".join(points), i % 4))
        body.append(line(x(median), 32, x(median), bottom, f"median s{i % 4}"))
        # Medians that lie close together keep their words apart.
        body.append(
            text(
                min(max(x(median), 60), WIDTH - 60), 12 + 15 * (i % 2), f"{name} {median:.3g} {unit}", "label", "middle"
            )
        )
    described = "; ".join(f"{name}: median {median:.4g} {unit}" for name, (_, _, median) in series.items())
    return svg(title, described, height, body)


def ranges(title: str, edges: Sequence[float], counts: Mapping[str, Sequence[int]], low: float, high: float) -> Markup:
    """Histograms of one activation under several image sets, one under the other, over the quantized range.

    edges      of the common bins
    counts     image set -> counts; heights are logarithmic, because the tails are what calibration is about
    low, high  the quantized range, drawn as a band
    """
    left, right = min(edges[0], low), max(edges[-1], high)
    row = 62.0
    height = row * len(counts) + 26

    def x(value: float) -> float:
        return LEFT + (value - left) / (right - left) * (WIDTH - 2 * LEFT) if right > left else LEFT

    body = [rect(x(low), 0, max(x(high) - x(low), 1.5), height - 24, "band")]
    body += [text(x(t), height - 6, f"{t:g}", "tick", "middle") for t in ticks(left, right)]
    described = []
    for i, (name, values) in enumerate(counts.items()):
        bottom = row * (i + 1) - 4
        peak = math.log1p(max(values)) or 1.0
        for a, b, count in zip(edges, edges[1:], values, strict=False):
            if count:
                tall = math.log1p(count) / peak * (row - 24)
                inside = (a + b) / 2 >= low and (a + b) / 2 <= high
                body.append(rect(x(a), bottom - tall, x(b) - x(a) - 0.5, tall, "bar" if inside else "bar out"))
        body.append(line(LEFT, bottom, WIDTH - LEFT, bottom, "axis"))
        body.append(text(LEFT + 2, bottom - row + 18, shortened(name), "label"))
        used = [j for j, count in enumerate(values) if count]
        if used:
            described.append(f"{name}: {edges[used[0]]:.4g} to {edges[used[-1] + 1]:.4g}")
    return svg(title, f"Quantized range {low:.4g} to {high:.4g}. {'; '.join(described)}.", height, body)


def shortened(name: str, limit: int = 60) -> str:
    """A long reference with its middle left out."""
    return name if len(name) <= limit else f"{name[: limit // 3]}…{name[-(limit - limit // 3 - 1) :]}"
