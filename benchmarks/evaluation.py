"""The tables of docs/evaluation.md and docs/model-card.md: python benchmarks/evaluation.py DIR/results.json

Rows keep their place and their name; what stands beside it is replaced, and the file is kept as docs/evaluation.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from t2ct.eval.page import sections, shown, tell
from t2ct.files import write_files

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ("evaluation.md", "model-card.md")
KEPT = "evaluation.json"
FINDINGS = "| finding | cases | AUC, phantoms | AUC, generated |"


def rows_of(content: dict[str, Any]) -> dict[str, str]:
    """Name -> row, of every figure and every point of the sweeps."""
    rows = {}
    for title, _, figures in sections(content):
        if not title.endswith("by finding"):
            rows |= {n: f"| {n} | {' | '.join((*shown(f), str(f['n']), tell(n)))} |" for n, f in figures}
    for kind, points in content["ablation"].items():
        for at, table in points.items() if kind in ("guidance", "steps") else ():
            auc, distance = (table[name]["value"] for name in ("auc_macro", "fid_3d_of_n"))
            rows[f"{kind} {at}"] = f"| {kind} {at} | {auc:.3f} | {distance:.1f} |"
    return rows


def finding_rows(content: dict[str, Any]) -> dict[str, str]:
    """Finding -> cases, AUC on phantoms, AUC and its interval on what was generated."""
    found = {}
    for name, row in content["factual"]["by_finding"].items():
        real, made = row["auc_real"], row["auc_generated"]
        told = f"{made['value']:.2f} [{made['low']:.2f}, {made['high']:.2f}]"
        found[name] = f"| {name} | {row['cases']} | {real['value']:.2f} | {told} |"
    return found


def filled(page: str, content: dict[str, Any]) -> str:
    """A page with the rows that the evaluation knows."""
    rows, findings, lines, among = rows_of(content), finding_rows(content), [], False
    for line in page.splitlines():
        among = line == FINDINGS or (among and line.startswith("|"))
        name = line.split("|")[1].strip() if line.startswith("| ") else ""
        lines.append((findings if among else rows).get(name, line))
    return "\n".join(lines) + "\n"


def main(path: str) -> None:
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    content.get("memorisation", {}).pop("pairs", None)
    files = {DOCS / page: filled((DOCS / page).read_text(encoding="utf-8"), content).encode() for page in PAGES}
    write_files(files | {DOCS / KEPT: (json.dumps(content, indent=1) + "\n").encode()})


if __name__ == "__main__":
    main(*sys.argv[1:])
