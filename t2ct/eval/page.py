"""The results for people: tables as Markdown for the terminal, and one page with tables, plots and pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from t2ct.eval.metrics.alignment import RANKS
from t2ct.train.show.figures import picture_pairs
from t2ct.train.show.report import STYLE, curve

if TYPE_CHECKING:
    from t2ct.eval.bench import Bench, System

HEADS = {
    "fidelity": "How far are generated volumes from real ones, as sets? (Table 2)",
    "factual": "Does a classifier find in them what the report says? (Table 3)",
    "alignment": "Do reports and volumes meet in CLIP3D's space? (Table 4)",
    "ablation": "What do guidance, steps and contrastive pre-training change? (Table 5, Fig. 3)",
    "utility": "Does a classifier learn from them? (Table 6)",
    "memorisation": "Are they copies of training volumes?",
    "difference": "b minus a, on the same reports",
    "contrastive": "With contrastive pre-training (second) minus without (first)",
}
TELLS = {
    "fid_2_5d": "Fréchet distance of slices' features, mean of three planes, extrapolated to infinitely many volumes",
    "fid_3d": "of volumes' features, extrapolated",
    "fid_axial": "of axial slices", "fid_coronal": "of coronal slices", "fid_sagittal": "of sagittal slices",
    "fid_2_5d_of_n": "the usual distance of slices, too large by what n volumes add",
    "fid_3d_of_n": "the usual distance of volumes, too large by what n volumes add",
    "kid_2_5d": "kernel distance of slices, unbiased for any n", "kid_3d": "of volumes, unbiased for any n",
    "fvd_vlm3d": "mean of groups of four pairs, as the VLM3D challenge",
    "fid_3d_of_training_volumes": "unseen against training volumes: what real against real comes to",
    "kid_3d_of_training_volumes": "real against real, unbiased",
    **{f"{kind}_{mean}_{side}": f"{told}, {how}, on {side} volumes" for side in ("real", "generated")
       for kind, told in (("auc", "the judge's AUC"), ("precision", "its precision at probability 0.5"))
       for mean, how in (("macro", "mean of findings"), ("weighted", "weighed by cases"))},
    "calibration_error_real": "of the judge's probabilities, on real volumes",
    "calibration_error_generated": "of the judge's probabilities, on generated volumes",
    **{f"map_at_{k}": f"findings shared with the {k} nearest other real volumes, Jaccard index" for k in RANKS},
    **{f"map_at_{k}_with_itself": "where a volume finds itself too: as CT-CLIP's script" for k in RANKS},
    **{f"map_at_{k}_generated_to_real": f"of a generated volume with the {k} nearest real ones" for k in RANKS},
    **{f"report_to_volume_r{k}": f"reports whose real volume is among the {k} nearest; chance {k}/n" for k in RANKS},
    **{f"report_to_generated_r{k}": f"whose generated volume is; chance {k}/n" for k in RANKS},
    **{f"nearest_{space}_{side}": f"{side} volumes' distance to the nearest training volume, mean, {unit}"
       for space, unit in (("embedding", "root mean square"), ("pixel", "root mean square HU"))
       for side in ("generated", "unseen")},
    **{f"{kind}_{side}": f"{told} that the report tells and the judge finds in {side} volumes"
       for side in ("real", "generated")
       for kind, told in (("side", "sides"), ("lobe", "lobes"), ("size", "sizes"),
                          ("size_within_one_class", "sizes, or their neighbours,"))},
    "auc_macro_generated_minus_real": "below 0: findings are lost",
    "auc_macro_generated_over_real": "their share that is kept",
    "zero_shot_auc": "real volumes, \"X is present.\" against \"X is not present.\"",
    "zero_shot_auc_generated": "generated volumes",
    "clip_score": "100 cos(generated, report)", "clip_score_of_real": "100 cos(real, report)",
    "clip_score_to_real": "100 cos(generated, real)",
    "auc_real": "probe trained on real volumes", "auc_synthetic": "on generated ones",
    "auc_real_and_synthetic": "on both", "auc_gained_by_synthetic": "both minus real",
    "too_close_embedding": "share nearer to a training volume than 95 % of unseen real ones; by chance 0.05",
    "too_close_pixel": "the same voxel by voxel; by chance 0.05",
    "auc_macro": "of the judge, mean over findings", "precision_macro": "of the judge, at probability 0.5",
}  # fmt: skip
Row = tuple[str, dict[str, Any]]


def is_figure(value: Any) -> bool:
    """Whether a value of results.json is a figure with its interval."""
    return isinstance(value, dict) and set(value) == {"value", "low", "high", "n"}


def sections(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str, list[Row]]]:
    """(title, explanation, rows) of every table in results.json."""
    for name, table in content.items():
        if not isinstance(table, dict) or name in ("settings", "facts"):
            continue
        if name in ("a", "b"):
            yield from sections(table, f"{name}: ")
            continue
        rows = [(key, value) for key, value in table.items() if is_figure(value)]
        if rows:
            yield f"{prefix}{name}", HEADS.get(name, ""), rows
        if "contrastive" in table:
            yield f"{prefix}contrastive", HEADS["contrastive"], [
                (k, v) for k, v in table["contrastive"].items() if is_figure(v)
            ]  # fmt: skip
        if "by_finding" in table:
            yield f"{prefix}by finding", "", [
                (f"{finding}: {key.replace('_', ' ')} ({row['cases']} cases)", value)
                for finding, row in table["by_finding"].items() for key, value in row.items() if is_figure(value)
            ]  # fmt: skip


def sweeps(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows) of the sweeps over guidance and steps."""
    for name in ("a", "b"):
        if name in content:
            yield from sweeps(content[name], f"{name}: ")
    for key, told in (("guidance", "guidance scale"), ("steps", "sampling steps")):
        points = content.get("ablation", {}).get(key, {})
        if points:
            columns = list(next(iter(points.values())))
            rows = [[at, *(" ".join(shown(point[c], "[{}, {}]")) for c in columns)] for at, point in points.items()]
            n = next(iter(next(iter(points.values())).values()))["n"]
            yield f"{prefix}{told}, {n} reports each", [told, *columns], rows


def shown(figure: dict[str, Any], form: str = "{} to {}") -> tuple[str, str]:
    """A value and its interval as text."""
    if figure["value"] is None:
        return "not measurable", ""
    if figure["low"] is None or figure["high"] is None:
        return _number(figure["value"]), ""
    return _number(figure["value"]), form.format(_number(figure["low"]), _number(figure["high"]))


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


def summary(content: dict[str, Any]) -> str:
    """All tables but those finding by finding, as Markdown."""
    lines = [f"{_told(content)}, {content['n']} reports, t2ct {content['version']}, {content['date']}"]
    for title, head, rows in sections(content):
        if title.endswith("by finding"):
            continue
        lines += ["", f"| {title}: {head or 'figures'} | value | 95 % interval | n | what |", "|---|---|---|---|---|"]
        for name, figure in rows:
            lines.append("| " + " | ".join((name, *shown(figure), str(figure["n"]), tell(name))) + " |")
    for title, columns, points in sweeps(content):
        lines += ["", f"{title}:", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in points]
    lines += ["", *(f"- {note}" for note in content["notes"])]
    return "\n".join(lines).rstrip()


def write_page(content: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """report.html, with nothing outside it. pictures: caption -> PNG."""
    parts = [f"<h1>Evaluation of {html.escape(_told(content))}</h1>"]
    facts = {k: content[k] for k in ("data", "n", "version", "date") if k in content} | content.get("settings", {})
    parts.append(_table([(k, str(v)) for k, v in facts.items()]))
    if content["notes"]:
        parts.append("<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in content["notes"]) + "</ul>")
    for title, head, rows in sections(content):
        cells = [(name, *shown(figure), f"n = {figure['n']}", tell(name)) for name, figure in rows]
        parts.append(f"<h2>{html.escape(title)}</h2><p>{html.escape(head)}</p>{_table(cells)}")
    for title, columns, points in sweeps(content):
        grid = _table([tuple(columns), *map(tuple, points)])
        parts.append(f"<h2>{html.escape(title)}</h2><p>{HEADS['ablation']}</p>{grid}")
    parts += list(_plots(content))
    for caption, png in pictures.items():
        data = base64.b64encode(png).decode()
        parts.append(
            f'<figure><img style="max-width:1100px" src="data:image/png;base64,{data}" alt="{html.escape(caption)}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>t2ct evaluation</title>'
        f"<style>{STYLE}</style>{''.join(parts)}</html>"
    )


def pictures(bench: Bench, system: System, content: dict[str, Any]) -> dict[str, bytes]:
    """Real and generated volumes of the first reports; generated volumes and the training volumes nearest to them."""
    found: dict[str, bytes] = {}
    first = range(min(6, bench.count))
    pairs = [(bench.sets.test.read(i).hu, bench.volume(system, i)) for i in first]
    found["The first reports: real volume, generated volume, their difference; middle axial slice"] = _png(pairs)
    near = (content.get("memorisation") or content.get("b", {}).get("memorisation") or {}).get("pairs")
    if near and bench.sets.train is not None:
        pairs = [(bench.volume(system, i), bench.sets.train.read(k).hu) for i, k in near]
        found["Nearest pairs: generated volume, training volume, their difference; by embedding and by voxels"] = _png(
            pairs
        )
    return found


def _png(pairs: list[Any]) -> bytes:
    units = [tuple((torch.from_numpy(hu).float()[None, None] + 1000) / 2000 for hu in pair) for pair in pairs]
    return picture_pairs([(a.clamp(0, 1), b.clamp(0, 1)) for a, b in units])


def _told(content: dict[str, Any]) -> str:
    return str(content["model"]) if "model" in content else f"{content['a_is']} (a) and {content['b_is']} (b)"


def tell(name: str) -> str:
    return TELLS.get(name, "")


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _plots(content: dict[str, Any]) -> Iterator[str]:
    """The sweeps as curves, calibration, the findings as dots."""
    sides = {"": content} | {f"{k}: ": content[k] for k in ("a", "b") if k in content}
    for side, tables in sides.items():
        for sweep in ("guidance", "steps"):
            points = tables.get("ablation", {}).get(sweep, {})
            for key in next(iter(points.values()), {}):
                line = [(float(at), point[key]) for at, point in points.items() if point[key]["value"] is not None]
                values = [(x, f["value"]) for x, f in line]
                bars = [(f["low"], f["high"]) for _, f in line]
                yield curve(f"{side}{key} over {sweep}", values, bars if None not in sum(bars, ()) else ())
        for kind in ("real", "generated"):
            points = tables.get("factual", {}).get(f"reliability_{kind}")
            if points:
                yield curve(f"{side}frequency over the judge's probability, {kind} volumes", [tuple(p) for p in points])
        findings = tables.get("factual", {}).get("by_finding", {})
        if findings:
            yield dots(f"{side}AUC of the judge by finding: black real, blue generated", findings)


def dots(name: str, findings: dict[str, Any]) -> str:
    """AUC of every finding, with its interval, from 0 to 1."""
    left, width, step = 230, 420, 20
    colours = {"auc_real": "#111", "auc_generated": "#1f5fa8"}
    drawn = []
    for row, (finding, figures) in enumerate(findings.items()):
        y = 14 + step * row
        drawn.append(f'<text x="4" y="{y + 4}" font-size="12">{html.escape(finding)}</text>')
        for k, (key, colour) in enumerate(colours.items()):
            figure = figures.get(key)
            if not figure or figure["value"] is None:
                continue
            at, line = left + width * figure["value"], y - 2 + 5 * k
            if figure["low"] is not None:
                low, high = (left + width * figure[end] for end in ("low", "high"))
                drawn.append(f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{line}" y2="{line}" stroke="{colour}"/>')
            drawn.append(f'<circle cx="{at:.1f}" cy="{line}" r="3" fill="{colour}"/>')
    height = 20 + step * len(findings)
    for value in (0.0, 0.5, 1.0):
        x = left + width * value
        drawn.append(f'<line x1="{x}" x2="{x}" y1="4" y2="{height - 16}" stroke="#ccc"/>')
        drawn.append(f'<text x="{x}" y="{height - 3}" font-size="11" text-anchor="middle">{value:g}</text>')
    return (
        f'<figure><svg width="{left + width + 20}" height="{height}" role="img" aria-label="{html.escape(name)}">'
        f"{''.join(drawn)}</svg><figcaption>{html.escape(name)}</figcaption></figure>"
    )
