"""How good is a judge? Its answers on volumes whose labels are known."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from t2ct.checks import find_device
from t2ct.eval.look import Look, open_judge
from t2ct.eval.sets import labels_of, open_sets
from t2ct.eval.store import Seen
from t2ct.eval.tables import NEEDS, factual
from t2ct.models import VAE, hu_to_unit
from t2ct.models.layers import channels_last
from t2ct.train.parts.folders import load_part

SIDE = "_generated"  # how `factual` names what it measures, which here was not generated


def judged(
    data: str | Path = "phantoms:500", judge: str | Path | None = None, *, count: int | None = None,
    vae: str | Path | None = None, device: str | None = None, quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Figures of a judge (default: the package's) on the volumes to evaluate of `data`, as of `t2ct.eval.evaluate`.

    count: volumes at most. vae: a VAE's run, a model's folder or "embedded": volumes are brought to its size, encoded
    and decoded first, so that the figures say what of the findings comes through it. Returns "auc_macro",
    "auc_weighted", "precision_macro", "precision_weighted", "calibration_error", shares of sides, lobes and sizes
    found, all `Estimate`s, and "by_finding". Raises FileNotFoundError, or ValueError for data without labels or with
    too few volumes, before any volume is judged; warns where the judge may know the volumes: of the split "valid",
    which chose and calibrated it, or of none.
    """
    where = find_device(device)
    network, _ = open_judge(judge, None, where, str(data).startswith("phantoms:"))
    through, size = None, network.config.size
    if vae is not None:
        through, config, _ = load_part(vae, "vae", where)
        size = config.size
    sets = open_sets(data, size, count)
    if told := sets.known_to_judges:
        warnings.warn(f"data: {told}", stacklevel=2)
    test = sets.test
    labels, least = labels_of(test), NEEDS["factual"]
    if labels is None:
        raise ValueError(f"data: wanted labels, got none in {data}")
    if len(test) < least:
        raise ValueError(f"data: wanted at least {least} volumes, got {len(test)}")
    look = Look(network, None, (), where)
    rows = []
    for i in tqdm(range(len(test)), "judging", disable=quiet):
        hu = test.read(i).hu
        rows.append(look(hu if through is None else _coded(through, hu, where), whole=False))
    names: list[str] = [name for name in ("logits", "details") if name in rows[0]]
    seen: Seen = {name: np.stack([row[name] for row in rows]) for name in names}
    table = factual(None, seen, labels, [test.entries[i].texts[0] for i in range(len(test))])
    each = {name: {k.removesuffix(SIDE): v for k, v in row.items()} for name, row in table.pop("by_finding").items()}
    return {k.removesuffix(SIDE): v for k, v in table.items() if "reliability" not in k} | {"by_finding": each}


@torch.no_grad()
def _coded(vae: VAE, hu: np.ndarray, device: torch.device) -> np.ndarray:
    """hu (X, Y, Z), once through the VAE."""
    x = channels_last(hu_to_unit(torch.from_numpy(hu)[None, None]).to(device))
    return vae.decode(vae.encode(x)[0], hu=True)[0, 0].cpu().numpy()


def as_markdown(found: dict[str, Any]) -> str:
    """What `judged` returns as two tables."""
    lines = ["| figure | value and 95 % interval |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in found.items() if name != "by_finding"]
    lines += ["", "| finding | cases | AUC | precision |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {row['cases']} | {row['auc']} | {row['precision']} |" for name, row in found["by_finding"].items()
    ]
    return "\n".join(lines)
