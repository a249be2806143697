"""report.html: a run on one page, its curves as SVG and its pictures inside it."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path

from t2ct.files import write_files
from t2ct.train.show.metrics import read_table, status

WIDTH, HEIGHT, PAD = 560, 180, 44
STYLE = (
    "body{font:15px system-ui;margin:2em auto;max-width:1180px;padding:0 1em}table{border-collapse:collapse}"
    "td{padding:.15em 1em .15em 0;vertical-align:top}figure{display:inline-block;margin:.5em}svg{background:#fafafa}"
    "figcaption{font-size:13px;color:#444}img{max-width:540px}pre{background:#fafafa;padding:1em;overflow:auto}"
)
PICTURES = 8  # newest shown


def curve(name: str, points: list[tuple[float, float]], bars: Sequence[tuple[float, float]] = ()) -> str:
    """One figure as SVG, or nothing where there are no two points. bars: (low, high) of every point, all finite."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if len(points) < 2:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min([*ys, *(bar[0] for bar in bars)]), max([*ys, *(bar[1] for bar in bars)])
    span_x, span_y = max(xs[-1] - xs[0], 1e-12), max(high - low, 1e-12)

    def place(x: float, y: float) -> tuple[float, float]:
        return PAD + (x - xs[0]) / span_x * (WIDTH - PAD - 8), HEIGHT - 20 - (y - low) / span_y * (HEIGHT - 32)

    path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)
    marks = "".join(
        '<polyline stroke="#9ab" points="{:.1f},{:.1f} {:.1f},{:.1f}"/>'.format(*place(x, a), *place(x, b))
        for x, (a, b) in zip(xs, bars, strict=False)
    )
    ticks = "".join(
        f'<text x="2" y="{y}" font-size="11">{value:.3g}</text>' for y, value in ((16, high), (HEIGHT - 20, low))
    ) + "".join(
        f'<text x="{x}" y="{HEIGHT - 4}" font-size="11" text-anchor="{anchor}">{value:.0f}</text>'
        for x, anchor, value in ((PAD, "start", xs[0]), (WIDTH - 8, "end", xs[-1]))
    )
    return (
        f'<figure><svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{html.escape(name)}">{ticks}{marks}'
        f'<polyline fill="none" stroke="#1f5fa8" stroke-width="1.5" points="{path}"/></svg>'
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
    )


def write_report(folder: str | Path) -> Path:
    """Write folder/report.html from the run's tables, pictures and configuration; returns its path."""
    root = Path(folder)
    facts = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in status(root).items())
    curves = []
    for table in ("metrics", "validation"):
        rows = read_table(root / f"{table}.csv")
        for name in list(rows[0])[1:] if rows else []:
            curves.append(curve(f"{table}: {name}", [(float(r["step"]), float(r[name])) for r in rows]))
    pictures = []
    for path in sorted((root / "previews").glob("*.png"))[-PICTURES:]:
        data = base64.b64encode(path.read_bytes()).decode()
        pictures.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{path.stem}">'
            f"<figcaption>{path.stem}</figcaption></figure>"
        )
    config = root / "config.toml"
    told = html.escape(config.read_text(encoding="utf-8")) if config.exists() else ""
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>t2ct run {html.escape(root.name)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(root.name)}</h1><table>{facts}</table>"
        f"<h2>Curves</h2>{''.join(curves)}<h2>Pictures</h2>{''.join(pictures)}<h2>Configuration</h2><pre>{told}</pre>"
    )
    write_files({root / "report.html": page.encode()})
    return root / "report.html"
