"""The page a person opens after a transfer: one HTML file without scripts, fonts or other files."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ._files import atomic_file
from .config import TransferConfig
from .report import loss_names

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8882;--bar:#2962ff}
body{font:15px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin:2rem 0 .5rem}
p{margin:.3rem 0}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.2rem 1rem .2rem 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line)}
th{font-weight:600}td{overflow-wrap:anywhere}td.n,th.n{text-align:right}
tr.chosen{font-weight:600}
figure{margin:0 0 1rem}figcaption{margin-bottom:.2rem}
svg{width:100%;max-width:680px;height:auto;font:11px system-ui,sans-serif}
svg text{fill:currentColor}.grid{stroke:var(--line)}.raw{stroke:var(--bar);opacity:.35}
.smooth{stroke:var(--bar);stroke-width:2}.bar{fill:var(--bar)}
.meter{background:var(--soft);width:12rem;margin-top:.4rem}
.meter i{display:block;height:.7rem;background:var(--bar)}
summary{cursor:pointer;font-weight:600;margin-top:1.2rem}details table{margin-top:.5rem}
"""


def write_html(path: Path, report: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
    """Write ``report`` and ``history``, those of a :class:`~pkt_fast.TransferResult`, as a page."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>pkt_fast transfer</title><style>{_STYLE}</style></head><body>",
        f"<h1>pkt_fast transfer</h1><p>{_text(report['summary']['pairs'])}</p>",
        _facts("Summary", {k: v for k, v in report["summary"].items() if k != "pairs"}),
        _section("Losses", "".join(_curve(name, history) for name in loss_names(history))),
        _attribution(report),
        _alignment(report["alignment"]),
        _phases(report["phases"]),
        _facts("Data", _data(report["data"])),
        _facts("Delta", report["delta"]),
        _settings(report["config"]),
        _details("Op implementations", report["ops"]),
        _details("Versions", report["versions"]),
        _details("Machine", report["machine"]),
        "</body></html>\n",
    ]
    with atomic_file(path) as temporary:
        temporary.write_text("".join(parts), encoding="utf-8")


# --------------------------------------------------------------------------- sections


def _attribution(report: Mapping[str, Any]) -> str:
    scores = report["attribution"]
    if not scores:
        return ""
    paired = {layer for pair in report["pairs"] for layer in pair["source"]}
    top = max(map(abs, scores)) or 1.0
    rows = [
        (_cell(layer, "n"), _cell(f"{score:.4g}", "n"), _meter(abs(score) / top))
        for layer, score in enumerate(scores)
    ]
    chosen = [layer in paired for layer in range(len(scores))]
    note = "<p>Gradient × activation of every source layer; those that were paired are bold.</p>"
    head = (("source layer", "n"), ("score", "n"), ("", ""))
    return _section("Attribution", note + _table(rows, head, chosen))


def _alignment(alignments: Sequence[Mapping[str, Any]]) -> str:
    judged = [a for a in alignments if a["cosine"] is not None]
    if not judged:
        return ""
    figures = [
        (key, title)
        for key, title in (
            ("cosine", "cosine"), ("chance", "by chance"), ("r2", "R²"),
            ("round_trip", "round trip"),
        )
        if any(a[key] is not None for a in judged)
    ]  # fmt: skip
    head = [("target layer", "n"), ("source layers", "n"), *((title, "n") for _, title in figures)]
    rows = [
        [
            _cell(a["target"], "n"),
            _cell(", ".join(map(str, a["source"])), "n"),
            *(_cell("–" if a[key] is None else f"{a[key]:.3f}", "n") for key, _ in figures),
        ]
        for a in judged
    ]
    note = "<p>How well the map predicts the target's own activations on held-out tokens.</p>"
    return _section("Alignment", note + _table(rows, head))


def _phases(phases: Mapping[str, Mapping[str, Any]]) -> str:
    longest = max((phase["seconds"] for phase in phases.values()), default=0) or 1.0
    rows = [
        (
            _cell(name),
            _cell(f"{phase['seconds']:.2f}", "n"),
            _meter(phase["seconds"] / longest),
            _cell(_number(phase["tokens"]) if "tokens" in phase else "", "n"),
            _cell(f"{phase['tokens_per_second']:,.0f}" if "tokens" in phase else "", "n"),
        )
        for name, phase in phases.items()
    ]
    head = (("phase", ""), ("seconds", "n"), ("", ""), ("tokens", "n"), ("tokens/s", "n"))
    return _section("Phases", _table(rows, head))


def _data(data: Mapping[str, Any]) -> dict[str, Any]:
    """The facts about the data, with formats and dropped rows as words."""
    shown = {k: v for k, v in data.items() if k not in ("formats", "dropped", "max_length")}
    shown["formats"] = ", ".join(f"{count:,} {name}" for name, count in data["formats"].items())
    if data["dropped"]:
        reasons = (f"{len(rows):,}: {reason}" for reason, rows in data["dropped"].items())
        shown["dropped"] = "; ".join(reasons)
    return shown


def _settings(config: Mapping[str, Any]) -> str:
    """What differs from the defaults, and all settings behind a click."""
    plain = TransferConfig().as_dict()
    changed = {name: value for name, value in config.items() if plain.get(name) != value}
    known = [field.name for field in fields(TransferConfig)]
    everything = {name: config[name] for name in known if name in config}
    note = "" if changed else "<p>All are the defaults.</p>"
    shown = _rows(changed) if changed else ""
    return _section("Settings", note + shown + _details("All settings", everything))


# --------------------------------------------------------------------------- curves


def _curve(name: str, history: Sequence[Mapping[str, Any]]) -> str:
    """One loss over the steps: every value, and above a few steps their moving mean."""
    points = [(record["step"], float(record[name])) for record in history if name in record]
    steps, values = zip(*points, strict=True)
    caption = f"{_text(name.replace('_', ' '))}: {values[0]:.4f} → {values[-1]:.4f}"
    if len(points) < 2:
        return f"<p>{caption}</p>"
    width, height, left, below, margin = 680, 190, 60, 26, 10
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0

    def x(step: float) -> float:
        return left + (step - steps[0]) / (steps[-1] - steps[0]) * (width - left - margin)

    def y(value: float) -> float:
        return margin + (high - value) / span * (height - below - margin)

    def line(kind: str, drawn: Iterable[float]) -> str:
        path = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(steps, drawn, strict=True))
        return f"<polyline class='{kind}' fill='none' points='{path}'/>"

    drawing = "".join(
        f"<line class='grid' x1='{left}' x2='{width - margin}' y1='{y(v):.1f}' y2='{y(v):.1f}'/>"
        f"<text x='{left - 6}' y='{y(v) + 4:.1f}' text-anchor='end'>{v:.4g}</text>"
        for v in (low, (low + high) / 2, high)
    )
    drawing += "".join(
        f"<text x='{x(step):.1f}' y='{height - 6}' text-anchor='{anchor}'>{text}</text>"
        for step, anchor, text in (
            (steps[0], "start", f"step {steps[0]}"), (steps[-1], "end", f"step {steps[-1]}")
        )
    )  # fmt: skip
    window = len(values) // 10
    if window < 2:
        drawing += line("smooth", values)
    else:
        drawing += line("raw", values) + line("smooth", _moving_mean(values, window))
        caption += f" (thick: mean of {2 * window + 1} steps)"
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f"<svg viewBox='0 0 {width} {height}' role='img' aria-label='{_text(name)}'>{drawing}</svg>"
        "</figure>"
    )


def _moving_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of up to ``window`` values on either side of each."""
    parts = [values[max(0, i - window) : i + window + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


# --------------------------------------------------------------------------- pieces


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{body}</section>" if body else ""


def _facts(title: str, rows: Mapping[Any, Any]) -> str:
    return _section(title, _rows(rows) if rows else "")


def _details(title: str, rows: Mapping[Any, Any]) -> str:
    return f"<details><summary>{_text(title)}</summary>{_rows(rows)}</details>" if rows else ""


def _rows(rows: Mapping[Any, Any]) -> str:
    return _table([(_name(key), _cell(_number(value))) for key, value in rows.items()])


def _table(
    rows: Sequence[Sequence[str]],
    head: Sequence[tuple[str, str]] = (),
    chosen: Sequence[bool] = (),
) -> str:
    """A table of finished cells; ``head`` has a title and a class for each column."""
    top = "".join(f"<th class='{kind}'>{_text(title)}</th>" for title, kind in head)
    marks = [" class='chosen'" if mark else "" for mark in chosen] or [""] * len(rows)
    body = "".join(f"<tr{mark}>{''.join(row)}</tr>" for mark, row in zip(marks, rows, strict=True))
    return f"<table>{f'<tr>{top}</tr>' if head else ''}{body}</table>"


def _name(key: Any) -> str:
    return f"<th>{_text(str(key).replace('_', ' '))}</th>"


def _cell(value: Any, kind: str = "") -> str:
    return f"<td class='{kind}'>{_text(value)}</td>" if kind else f"<td>{_text(value)}</td>"


def _meter(share: float) -> str:
    return f"<td><div class='meter'><i style='width:{share:.1%}'></i></div></td>"


def _number(value: Any) -> str:
    """A value as a person writes it: 23,552; on; none; 3, 5."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _text(value: Any) -> str:
    return html.escape(str(value))
