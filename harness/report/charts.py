"""Vega-Lite specifications without data or colours: a page fills `datasets` and passes its theme as the config.

Marks name a style (`front`, `muted`, ...), never a colour, so that one specification serves light, dark and print.
The field `i` is a row's index: the page's own tooltip looks the row up.
"""

from __future__ import annotations

from typing import Any

Spec = dict[str, Any]
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # a name, never fetched


def _axis(field: str, *, log: bool = False) -> Spec:
    scale: Spec = {"type": "log", "nice": False} if log else {"zero": False, "padding": 12}
    return {"field": field, "type": "quantitative", "title": "", "scale": scale}


def _layer(data: str, mark: Spec, **encoding: Any) -> Spec:
    return {"data": {"name": data}, "mark": mark, "encoding": encoding}


def pareto() -> Spec:
    """Two metrics against each other. Datasets: others, infeasible, front, baseline, limits_x, limits_y."""
    x, y, tip = _axis("x"), _axis("y"), {"field": "i", "type": "quantitative"}
    ends = {"x": {**x, "field": "xl"}, "x2": {"field": "xh"}}, {"y": {**y, "field": "yl"}, "y2": {"field": "yh"}}
    text = {"field": "text", "type": "nominal"}
    layers = [
        _layer("limits_x", {"type": "rule", "style": "limit"}, x=x),
        _layer("limits_y", {"type": "rule", "style": "limit"}, y=y),
        _layer(
            "limits_x", {"type": "text", "style": "limit_text", "angle": 90, "dy": -7}, x=x, y={"value": 4}, text=text
        ),
        _layer("limits_y", {"type": "text", "style": "limit_text", "dy": -5}, y=y, x={"value": 4}, text=text),
        _layer("front", {"type": "line", "style": "front_line", "interpolate": "step-after"}, x=x, y=y),
    ]
    for name in ("others", "front"):
        layers.append(_layer(name, {"type": "rule", "style": "interval"}, **ends[0], y=y))
        layers.append(_layer(name, {"type": "rule", "style": "interval"}, x=x, **ends[1]))
    for name, shape, size in (
        ("infeasible", "circle", 42),
        ("others", "circle", 48),
        ("front", "circle", 90),
        ("baseline", "diamond", 150),
    ):
        layers.append(
            _layer(name, {"type": "point", "style": name, "shape": shape, "size": size}, x=x, y=y, tooltip=tip)
        )
    layers.append(_layer("labels", {"type": "text", "style": "halo", "dx": 9, "align": "left"}, x=x, y=y, text=text))
    layers.append(_layer("labels", {"type": "text", "style": "label", "dx": 9, "align": "left"}, x=x, y=y, text=text))
    names = ("others", "infeasible", "front", "baseline", "limits_x", "limits_y", "labels")
    return _top(layers, names, 420)


def intervals() -> Spec:
    """A dot and its interval a row, one line each. Dataset dots: i, name, v, l, h, series."""
    y = {"field": "name", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 230, "grid": True}}
    x = {"field": "v", "type": "quantitative", "title": "", "scale": {"zero": True}}
    kind = {"field": "series", "type": "nominal", "title": None, "sort": None, "legend": {"orient": "top", "offset": 4}}
    layers = [
        _layer("dots", {"type": "rule", "style": "interval"}, y=y, x={**x, "field": "l"}, x2={"field": "h"}),
        _layer(
            "dots",
            {"type": "point", "size": 60, "filled": True, "opacity": 1},
            y=y,
            x=x,
            color=kind,
            shape=kind,
            tooltip={"field": "i", "type": "quantitative"},
        ),
    ]
    return _top(layers, ("dots",), {"step": 21})


def parallel() -> Spec:
    """A line a row through choices and figures. Datasets: poles, lines (i, dim, pos, score), ticks (dim, pos, text)."""
    x = {
        "field": "dim",
        "type": "nominal",
        "sort": None,
        "title": None,
        "scale": {"type": "point", "padding": 0.35},
        "axis": {
            "orient": "top",
            "domain": False,
            "ticks": False,
            "labelAngle": 0,
            "labelPadding": 24,
            "labelLimit": 150,
            "labelExpr": "split(datum.label, '\\n')",
        },
    }
    y = {"field": "pos", "type": "quantitative", "axis": None, "scale": {"domain": [0, 1], "nice": False}}
    text = {"field": "text", "type": "nominal"}
    hovered = {"param": "hover", "empty": False}
    line = _layer(
        "lines",
        {"type": "line", "interpolate": "monotone", "strokeCap": "round"},
        x=x,
        y=y,
        detail={"field": "i", "type": "nominal"},
        color={"field": "score", "type": "quantitative", "legend": None, "scale": {"domain": [0, 1]}},
        opacity={"condition": {**hovered, "value": 1}, "value": 0.5},
        strokeWidth={"condition": {**hovered, "value": 4}, "value": 1.6},
        tooltip={"field": "i", "type": "quantitative"},
    )
    line["params"] = [
        {"name": "hover", "select": {"type": "point", "fields": ["i"], "on": "pointerover", "clear": "pointerout"}}
    ]
    layers = [
        _layer("poles", {"type": "rule", "style": "pole"}, x=x, y={**y, "field": "a"}, y2={"field": "b"}),
        line,
        _layer("ticks", {"type": "text", "style": "halo", "align": "left", "dx": 6}, x=x, y=y, text=text),
        _layer("ticks", {"type": "text", "style": "label", "align": "left", "dx": 6}, x=x, y=y, text=text),
    ]
    return _top(layers, ("poles", "lines", "ticks"), 340)


def _top(layers: list[Spec], datasets: tuple[str, ...], height: int | Spec) -> Spec:
    return {
        "$schema": SCHEMA,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "datasets": {name: [] for name in datasets},
        "layer": layers,
    }


def theme(dark: bool) -> Spec:
    """The Vega config of one theme; the same palette as page.css."""
    ink, muted, line, paper = (
        ("#e6e6e3", "#9a9a94", "#33342f", "#171816") if dark else ("#1d1e1b", "#6b6c66", "#e2e2dc", "#ffffff")
    )
    accent, warm, bad = ("#6cb6ff", "#f0a45d", "#f47b6f") if dark else ("#0b62c4", "#b4530a", "#b3261e")
    font = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
    text = {"font": font, "fontSize": 11.5, "color": ink}
    return {
        "background": "transparent",
        "font": font,
        "view": {"stroke": None},
        "axis": {
            "labelColor": muted,
            "titleColor": ink,
            "titleFontWeight": 500,
            "titleFontSize": 12,
            "titlePadding": 10,
            "labelFontSize": 11,
            "gridColor": line,
            "domainColor": line,
            "tickColor": line,
        },
        "axisX": {"tickCount": 7},
        "axisY": {"tickCount": 7},
        "axisBand": {"labelColor": ink, "domain": False, "ticks": False, "gridDash": [1, 3]},
        "axisPoint": {"labelColor": ink, "domain": False, "ticks": False, "labelFontSize": 11.5},
        "legend": {"labelColor": ink, "labelFontSize": 11.5, "symbolStrokeWidth": 0},
        "range": {"category": [accent, warm, muted], "ramp": [line, muted, accent]},
        "style": {
            "limit": {"color": bad, "strokeDash": [5, 4], "strokeWidth": 1.2},
            "limit_text": {**text, "color": bad, "align": "left", "fontSize": 11},
            "front_line": {"color": accent, "strokeWidth": 1.5, "opacity": 0.55},
            "interval": {"color": muted, "strokeWidth": 1, "opacity": 0.7},
            "infeasible": {"color": muted, "strokeWidth": 1.2, "filled": False, "opacity": 0.8},
            "others": {"color": muted, "filled": True, "opacity": 0.8},
            "front": {"color": accent, "filled": True, "opacity": 1},
            "baseline": {"color": warm, "filled": True, "opacity": 1},
            "label": text,
            "halo": {**text, "stroke": paper, "strokeWidth": 4, "strokeJoin": "round"},
            "pole": {"color": muted, "strokeWidth": 1, "opacity": 0.6},
        },
    }
