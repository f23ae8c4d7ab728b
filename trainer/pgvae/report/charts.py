"""Charts as SVG that takes its colours from the page, so that one drawing serves light and dark."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from pgvae.report.insight import Gate, LatentMap
from pgvae.report.words import OWN, method_name
from pgvae.rows import CurvePoint, Epoch, Metric

# Colours that stand for a CSS variable of the page, see page.html.
_INK, _MUTED, _GRID = "#010101", "#020202", "#030303"
_SERIES = ("#0a0101", "#0a0202", "#0a0303", "#0a0404", "#0a0505", "#0a0606", "#0a0707")
_RAMP = ("#0b0101", "#0b0202", "#0b0303", "#0b0404")
_VARIABLES = {_INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--grid)"} | {
    colour: f"var(--{name}-{number})"
    for name, colours in (("series", _SERIES), ("ramp", _RAMP))
    for number, colour in enumerate(colours, 1)
}
_STYLE: Any = {
    # Text stays text: it takes the page's font, can be searched, and needs no glyphs.
    "svg.fonttype": "none",
    "svg.hashsalt": "pgvae",
    # A name from the data may hold a dollar sign.
    "text.parse_math": False,
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.titlecolor": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "axes.edgecolor": _GRID,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 10,
}
_LEAST_BIN = 8
# At the width of a phone one unit of the drawing is about one CSS pixel.
_WIDTH = 4.2
_PER_ROW = 0.32
_LONGEST_LABEL = 24


def learning_curves(passes: Sequence[Epoch]) -> Markup:
    """Draws the loss of each phase and, beneath, the NDCG on the validation part, by pass."""
    phases = {phase: [p for p in passes if p.phase == phase] for phase in dict.fromkeys(p.phase for p in passes)}
    validated = [p for p in passes if p.validation_ndcg is not None]
    with matplotlib.rc_context(_STYLE):
        rows = 2 if validated else 1
        figure = Figure(figsize=(_WIDTH, 1.9 * rows + 0.4), layout="constrained")
        axes = np.atleast_1d(figure.subplots(rows, 1, sharex=True))
        for colour, (phase, own) in zip(_SERIES, phases.items(), strict=False):
            label = {"evaluate": "to measure", "publish": "to publish"}.get(phase, phase)
            _line(axes[0], [p.epoch for p in own], [p.loss for p in own], colour, label)
        axes[0].set_title("training loss per user")
        if len(phases) > 1:
            axes[0].legend()
        if validated:
            _line(axes[1], [p.epoch for p in validated], [p.validation_ndcg or 0 for p in validated], _SERIES[0], "")
            best = max(validated, key=lambda p: p.validation_ndcg or 0)
            axes[1].plot(best.epoch, best.validation_ndcg, "o", color=_SERIES[1], markersize=7)
            axes[1].set_title(f"validation NDCG@20, best in pass {best.epoch}")
        axes[-1].set_xlabel("pass over the users")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[-1].set_xlim(0.5, max(p.epoch for p in passes) + 0.5)
        return _svg(figure, "learning curves")


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], colour: str, label: str) -> None:
    axes.plot(x, y, color=colour, linewidth=1.8, marker="o", markersize=3 if len(x) > 1 else 6, label=label)


def comparison(rows: Sequence[Metric], title: str) -> Markup:
    """Draws one metric of each method as a point with its interval."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, _PER_ROW * len(rows) + 0.7), layout="constrained")
        axes = figure.subplots()
        y = np.arange(len(rows))[::-1]
        for place, row in zip(y, rows, strict=True):
            colour = _SERIES[0] if row.method == OWN else _MUTED
            _interval(axes, place, row.value, row.lower, row.upper, colour)
        axes.set_yticks(y, [_short(method_name(row.method)) for row in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        _percent_axis(axes)
        return _svg(figure, title)


def slices(rows: Sequence[tuple[str, Metric, Metric | None]], title: str, other: str) -> Markup:
    """Draws pgvae's metric in each slice with its interval, and beside it the value of another method."""
    with matplotlib.rc_context(_STYLE):
        # A label has two lines: of what, and which.
        figure = Figure(figsize=(_WIDTH, 1.35 * _PER_ROW * len(rows) + 1.0), layout="constrained")
        axes = figure.subplots()
        y = np.arange(len(rows))[::-1]
        for place, (_, own, beside) in zip(y, rows, strict=True):
            _interval(axes, place, own.value, own.lower, own.upper, _SERIES[0])
            if beside is not None:
                axes.plot(beside.value, place, "D", color=_SERIES[1], markersize=5, clip_on=False)
        axes.plot([], [], "o", color=_SERIES[0], label="pgvae")
        axes.plot([], [], "D", color=_SERIES[1], markersize=5, label=other)
        figure.legend(loc="outside lower center", ncols=2)
        axes.set_yticks(y, ["\n".join(map(_short, label.split(": ", 1))) for label, _, _ in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        _percent_axis(axes)
        return _svg(figure, title)


def gates(rows: Sequence[Gate], title: str) -> Markup:
    """Draws the mean attention gate of each kind of event, between 0 and 1."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, _PER_ROW * len(rows) + 0.9), layout="constrained")
        axes = figure.subplots()
        y = np.arange(len(rows))[::-1]
        axes.barh(y, [row.mean for row in rows], height=0.62, color=_SERIES[0])
        for place, row in zip(y, rows, strict=True):
            axes.annotate(
                f"{row.mean:.2f}", (row.mean, place), (4, 0), textcoords="offset points", va="center", color=_INK
            )
        axes.set_yticks(y, [_short(row.label) for row in rows])
        axes.set_xlim(0, 1.12)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.grid(axis="y", visible=False)
        return _svg(figure, title)


def reliability(given: Sequence[float], happened: Sequence[float]) -> Markup:
    """Draws, by size of the shares that were given, how much was given and how much happened."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.2), layout="constrained")
        axes = figure.subplots()
        heights = np.array([given, happened])
        # What is so small that nobody tells it apart is one pair of bars.
        heights[:, _LEAST_BIN] = heights[:, _LEAST_BIN:].sum(axis=1)
        filled = np.flatnonzero((heights[:, : _LEAST_BIN + 1] >= 1e-3).any(axis=0))
        bins = np.arange(filled[0], filled[-1] + 1) if len(filled) else filled
        x = -bins
        axes.bar(x - 0.2, heights[0, bins], width=0.38, color=_SERIES[0], label="predicted")
        axes.bar(x + 0.2, heights[1, bins], width=0.38, color=_SERIES[1], label="happened")
        axes.set_xticks(x, [_around(int(number)) for number in bins])
        axes.set_xlabel("predicted share of an item, around")
        axes.yaxis.set_major_formatter(FuncFormatter(_percent))
        axes.grid(axis="x", visible=False)
        axes.legend()
        return _svg(figure, "reliability of the predicted shares")


def _around(number: int) -> str:
    """Gives the share around which a bin of pgvae.measurement lies."""
    if number == _LEAST_BIN:
        return "less"
    if number < 4:
        return f"{4.0**-number:.0%}"
    return f"1 in\n{4**number}" if number < 5 else f"1 in\n{4**number // 1000} k"


def latent_map(latent: LatentMap) -> Markup:
    """Draws users as points, coloured by group."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 4.4), layout="constrained")
        axes = figure.subplots()
        colours = itertools.cycle(_RAMP if latent.is_ordered else _SERIES)
        for number, (group, colour) in enumerate(zip(latent.groups, colours, strict=False)):
            own = latent.points[latent.group == number]
            axes.plot(*own.T, "o", color=colour, alpha=0.6, markersize=3.5, markeredgewidth=0, label=group)
        # The directions have no unit.
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(f"first direction, {latent.explained[0]:.0%} of the differences")
        axes.set_ylabel(f"second direction, {latent.explained[1]:.0%}")
        figure.legend(loc="outside lower center", ncols=2, title=latent.title, markerscale=2)
        return _svg(figure, "latent map")


def demand(points: Sequence[CurvePoint]) -> Markup:
    """Draws expected units of items with their intervals, and what was sold, on logarithmic axes with room for 0."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
        axes = figure.subplots()
        x = np.log1p([point.x for point in points])
        low, high = (np.log1p([getattr(p, name) or 0.0 for p in points]) for name in ("lower", "upper"))
        axes.vlines(x, low, high, color=_MUTED, linewidth=1.0, alpha=0.35, label="80 % interval")
        axes.plot(x, np.log1p([p.y for p in points]), "o", color=_SERIES[0], markersize=3.5, alpha=0.75, label="sold")
        most = float(max(x.max(), np.log1p([p.y for p in points]).max(), high.max()))
        axes.plot([0, most], [0, most], color=_SERIES[1], linewidth=1.2, label="as expected")
        ticks = [0, *(10**power for power in range(10) if np.log1p(10**power) <= most)]
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks([float(np.log1p(tick)) for tick in ticks], [f"{tick:,}" for tick in ticks])
        axes.set_xlabel("units expected")
        axes.set_ylabel("units sold")
        figure.legend(loc="outside lower center", ncols=3)
        return _svg(figure, "demand, expected and sold")


def bands(points: Sequence[CurvePoint]) -> Markup:
    """Draws of each band of risk how many were expected to leave, and how many did, in shares of its people."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.75 * len(points) + 1.0), layout="constrained")
        axes = figure.subplots()
        y = np.arange(len(points))[::-1]
        for shift, colour, label, values in (
            (0.2, _SERIES[0], "expected to leave", [point.x for point in points]),
            (-0.2, _SERIES[1], "left", [point.y for point in points]),
        ):
            axes.barh(y + shift, values, height=0.36, color=colour, label=label)
            for place, value in zip(y + shift, values, strict=True):
                axes.annotate(
                    _percent(round(value, 3)),
                    (value, place),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                    color=_INK,
                )
        axes.set_yticks(y, [f"{_short(point.label or '')}\n{point.weight:,.0f} people" for point in points])
        axes.set_xlim(0, 1.18)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.xaxis.set_major_formatter(FuncFormatter(_percent))
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure, "people who left, by band of risk")


def gains(points: Sequence[CurvePoint], title: str) -> Markup:
    """Draws the share of the purchases that the best so many hundredths of the offers reach, a line for each method."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1.0, linestyle="--", label="by chance")
        for colour, method, own in _by_method(points):
            _line(axes, [0.0, *(p.x for p in own)], [0.0, *(p.y for p in own)], colour, method_name(method))
        _share_axes(axes, "share of all possible offers that is sent", "share of the purchases reached")
        return _svg(figure, title)


def uplift(points: Sequence[CurvePoint], title: str) -> Markup:
    """Draws the extra buyers that offers to the best so many hundredths of all brought, a line for each method.

    The interval is that of the model's own line.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.4), layout="constrained")
        axes = figure.subplots()
        for colour, method, own in _by_method(points):
            if method == OWN:
                ends = [0.0, 1.0], [0.0, own[-1].y]
                axes.plot(*ends, color=_MUTED, linewidth=1.0, linestyle="--", label="by chance")
                low, high = ([getattr(p, name) or 0.0 for p in own] for name in ("lower", "upper"))
                axes.fill_between([p.x for p in own], low, high, color=colour, alpha=0.15, linewidth=0)
            _line(axes, [p.x for p in own], [p.y for p in own], colour, method_name(method))
        _share_axes(axes, "share that gets the offer, best first", "extra buyers per offer of all")
        return _svg(figure, title)


def calibration(points: Sequence[CurvePoint], title: str) -> Markup:
    """Draws what happened by what was predicted, a line for each method, and the diagonal of a calibrated one."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.4), layout="constrained")
        axes = figure.subplots()
        most = max(max(point.x, point.y) for point in points)
        axes.plot([0, most], [0, most], color=_MUTED, linewidth=1.0, linestyle="--", label="calibrated")
        for colour, method, own in _by_method(points):
            _line(axes, [p.x for p in own], [p.y for p in own], colour, method_name(method))
        _share_axes(axes, "predicted", "happened")
        return _svg(figure, title)


def _interval(axes: Axes, place: float, value: float, lower: float | None, upper: float | None, colour: str) -> None:
    if lower is not None and upper is not None:
        axes.plot([lower, upper], [place, place], color=colour, linewidth=2.2, solid_capstyle="round")
    axes.plot(value, place, "o", color=colour, markersize=6.5)


def _by_method(points: Sequence[CurvePoint]) -> Iterator[tuple[str, str, list[CurvePoint]]]:
    """Gives the colour, the name and the points of each method."""
    for colour, method in zip(_SERIES, dict.fromkeys(point.method for point in points), strict=False):
        yield colour, method, [point for point in points if point.method == method]


def _share_axes(axes: Axes, x: str, y: str) -> None:
    axes.xaxis.set_major_formatter(FuncFormatter(_percent))
    axes.yaxis.set_major_formatter(FuncFormatter(_percent))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend()


def _percent_axis(axes: Axes) -> None:
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(_percent))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", visible=False)


def _percent(value: float, _: object = None) -> str:
    return f"{100 * value:.3g} %"


def _short(label: str) -> str:
    return label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 1] + "…"


def _svg(figure: Figure, label: str) -> Markup:
    """Gives the figure as SVG for a page: colours as variables, ids that a figure of another label has not."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    prefix = re.sub(r"\W+", "-", label) + "-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'href="#', f'href="#{prefix}', text)
    text = text.replace("url(#", f"url(#{prefix}")
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{Markup.escape(label)}"', 1))
