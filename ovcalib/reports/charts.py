"""Charts as inline SVG: no script, colours from the page's style sheet, and the figures again in a text alternative."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

WIDTH = 640
LEFT = 8
# Characters of a label that fit beside a chart, and dots of a scatter that are named in it.
LABEL_BESIDE = 8
NAMED_DOTS = 8
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


def intervals(title: str, rows: Sequence[tuple[str, float, float, float]], unit: str, zero: bool = False) -> Markup:
    """Values with their 95 % intervals, one under the other; long labels stand above them.

    rows   (label, value, low, high)
    zero   a line marks 0
    """
    low, high = min(r[2] for r in rows), max(r[3] for r in rows)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    margin = 0.08 * (high - low) or 1.0
    low, high = low - margin, high + margin
    above = max(len(r[0]) for r in rows) > LABEL_BESIDE
    left, right, row = (20.0 if above else 70.0), WIDTH - 20.0, (44 if above else 34)

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    bottom = row * len(rows) + 8
    body = [line(x(t), 4, x(t), bottom, "grid") for t in ticks(low, high)]
    body += [text(x(t), bottom + 16, f"{t:g}", "tick", "middle") for t in ticks(low, high)]
    body.append(text(right, bottom + 32, unit, "tick", "end"))
    if zero:
        body.append(line(x(0), 4, x(0), bottom, "axis"))
    for i, (label, value, lower, upper) in enumerate(rows):
        y = row * i + (34 if above else 22)
        css = f"s{i % 4}"
        body += [
            text(LEFT, y - 14 if above else y + 4, label, "label"),
            line(x(lower), y, x(upper), y, f"whisker {css}"),
            Markup('<circle cx="{}" cy="{}" r="6" class="dot {}"/>').format(f"{x(value):.1f}", y, css),
        ]
    described = "; ".join(
        f"{label}: {value:.4g} {unit} ({lower:.4g} to {upper:.4g})" for label, value, lower, upper in rows
    )
    return svg(title, described, bottom + 38, body)


def scatter(title: str, dots: Sequence[tuple[str, float, float]], x_unit: str, y_unit: str) -> Markup:
    """Points of two values, the less the better in x, the more the better in y; those that no other beats are joined.

    dots   (label, x, y)
    """
    height, left, bottom, top, right = 300.0, 64.0, 250.0, 12.0, WIDTH - 20.0
    spans = []
    for values in ([d[1] for d in dots], [d[2] for d in dots]):
        margin = 0.08 * (max(values) - min(values)) or 0.1 * abs(values[0]) or 1.0
        spans.append((min(values) - margin, max(values) + margin))
    (x0, x1), (y0, y1) = spans

    def x(value: float) -> float:
        return left + (value - x0) / (x1 - x0) * (right - left)

    def y(value: float) -> float:
        return bottom - (value - y0) / (y1 - y0) * (bottom - top)

    body = [line(x(t), top, x(t), bottom, "grid") for t in ticks(x0, x1)]
    body += [line(left, y(t), right, y(t), "grid") for t in ticks(y0, y1)]
    body += [text(x(t), bottom + 18, f"{t:g}", "tick", "middle") for t in ticks(x0, x1)]
    body += [text(left - 8, y(t) + 4, f"{t:g}", "tick", "end") for t in ticks(y0, y1)]
    body += [text(right, height - 6, x_unit, "tick", "end"), text(LEFT, top + 2, y_unit, "tick")]
    best = pareto([(d[1], d[2]) for d in dots])
    path = "L".join(f"{x(dots[i][1]):.1f} {y(dots[i][2]):.1f}" for i in best)
    body.append(Markup('<path d="M{}" class="frontier"/>').format(path))
    for i, (label, a, b) in enumerate(dots):
        css = "s2" if i in best else "s0"
        body.append(
            Markup('<circle cx="{}" cy="{}" r="6" class="dot {}"><title>{}</title></circle>').format(
                f"{x(a):.1f}", f"{y(b):.1f}", css, f"{label}: {a:.4g} {x_unit}, {b:.4g} {y_unit}"
            )
        )
        if len(dots) <= NAMED_DOTS:
            end = x(a) > (left + right) / 2
            body.append(text(x(a) + (-10 if end else 10), y(b) - 8, label, "tick", "end" if end else "start"))
    described = "; ".join(
        f"{label}: {a:.4g} {x_unit}, {b:.4g} {y_unit}{' (not beaten)' if i in best else ''}"
        for i, (label, a, b) in enumerate(dots)
    )
    return svg(title, described, height, body)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the points that no other beats: none has as little x and as much y, and differs; by x."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    found: list[int] = []
    for i in order:
        if not found or points[i][1] > points[found[-1]][1] or points[i] == points[found[-1]]:
            found.append(i)
    return found


def profile(title: str, rows: Sequence[tuple[str, float]], unit: str, limit: float) -> Markup:
    """One bar a layer along the network, from the first to the last.

    limit   a line marks it; bars below it stand out
    """
    height, left, bottom, top = 190.0, 40.0, 150.0, 8.0
    high, low = max(limit, *(value for _, value in rows)), min(0.0, *(value for _, value in rows))
    step = (WIDTH - left - LEFT) / len(rows)

    def y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    body = [line(left, y(t), WIDTH - LEFT, y(t), "grid") for t in ticks(low, high)]
    body += [text(left - 6, y(t) + 4, f"{t:g}", "tick", "end") for t in ticks(low, high)]
    for i, (name, value) in enumerate(rows):
        bar = rect(
            left + i * step,
            min(y(value), y(0)),
            step * 0.8,
            abs(y(value) - y(0)),
            "bar" if value >= limit else "bar out",
        )
        body.append(Markup("<g><title>{}</title>{}</g>").format(f"{name}: {value:.1f} {unit}", bar))
    body.append(line(left, y(limit), WIDTH - LEFT, y(limit), "axis"))
    body += [
        text(left, bottom + 18, "first layer", "tick"),
        text(WIDTH - LEFT, bottom + 18, "last layer", "tick", "end"),
        text(WIDTH - LEFT, height - 6, unit, "tick", "end"),
    ]
    lowest = min(rows, key=lambda row: row[1])
    described = f"{len(rows)} layers; lowest {lowest[0]}, {lowest[1]:.1f} {unit}; limit {limit:g} {unit}"
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
