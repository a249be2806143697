"""The tables of an evaluation, each computed from what was seen of the volumes: name -> figure, or dicts of these.

real, made: what `Look` took from the unseen volumes and from those generated from their reports, row i of both from
report i. labels: (N, 18) bool.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from t2ct.data.phantoms import LABELS
from t2ct.data.phantoms.reports.details import details_told, right_by_kind
from t2ct.eval.look import Clip
from t2ct.eval.metrics import alignment as al
from t2ct.eval.metrics import factual as fa
from t2ct.eval.metrics.estimate import Estimate, bootstrap, mean
from t2ct.eval.metrics.fidelity import distance, distance_by_plane, frechet, frechet_infinity, fvd_in_strata, kid
from t2ct.eval.metrics.memorisation import nearest, too_close
from t2ct.eval.store import Seen

Table = dict[str, Any]
PLANES = ("axial", "coronal", "sagittal")
NEEDS = {  # volumes at least
    "fidelity": 8, "factual": 2, "alignment": 2, "ablation": 8, "utility": 10, "memorisation": 2,
}  # fmt: skip
TABLES = tuple(NEEDS)
SPARE = 1  # volumes with and without a finding that a figure needs


def fidelity(real: Seen, made: Seen, known: Seen | None = None, paired: bool = True) -> Table:
    """Distances of the two sets of volumes; known: training volumes, whose distance from `real` says what is near."""
    flat_a, flat_b = real["slices"], made["slices"]  # (N, 3, K, F)
    over, *planes = distance_by_plane(frechet_infinity, flat_a, flat_b)
    table: Table = {
        "fid_2_5d": over,
        "fid_3d": distance(frechet_infinity, real["features"], made["features"]),
        **{f"fid_{name}": plane for name, plane in zip(PLANES, planes, strict=True)},
        "fid_2_5d_of_n": distance_by_plane(frechet, flat_a, flat_b)[0],
        "fid_3d_of_n": distance(frechet, real["features"], made["features"]),
        "kid_2_5d": distance_by_plane(kid, flat_a, flat_b)[0],
        "kid_3d": distance(kid, real["features"], made["features"]),
    }
    if paired:
        table["fvd_vlm3d"] = fvd_in_strata(real["features"], made["features"])
    if known is not None and len(known["features"]) >= NEEDS["fidelity"]:
        table["fid_3d_of_training_volumes"] = distance(frechet_infinity, real["features"], known["features"])
        table["kid_3d_of_training_volumes"] = distance(kid, real["features"], known["features"])
    return table


def factual(real: Seen | None, made: Seen, labels: np.ndarray, texts: list[str] | None = None) -> Table:
    """The judge's AUC, precision and calibration on real and on generated volumes, and finding by finding; of the
    sides, lobes and sizes that the reports `texts` tell, those that a judge which knows them finds again."""
    table: Table = {}
    sides = {"generated": made} if real is None else {"real": real, "generated": made}
    each: Table = {LABELS[k]: {"cases": int(labels[:, k].sum())} for k in measurable(labels)}
    for side, seen in sides.items():
        p = probabilities(seen)
        for kind, figures in (("auc", fa.aucs), ("precision", fa.precisions)):
            over, weighted, single = fa.averaged(figures, p, labels)
            table |= {f"{kind}_macro_{side}": over, f"{kind}_weighted_{side}": weighted}
            for name, row in each.items():
                row[f"{kind}_{side}"] = single[LABELS.index(name)]
        table[f"calibration_error_{side}"] = bootstrap(
            lambda i, p=p: fa.calibration_error(p[i], labels[i]), len(p)  # type: ignore[misc]
        )
        table[f"reliability_{side}"] = fa.reliability(p, labels)
    if texts is not None and all("details" in seen for seen in sides.values()):
        told = np.stack([details_told(text) for text in texts])
        for side, seen in sides.items():
            for kind, (right, cases) in right_by_kind(seen["details"], told).items():
                table[f"{kind}_{side}"] = _share(right, cases)
    if real is not None:
        a, b = probabilities(real), probabilities(made)
        table["auc_macro_generated_minus_real"] = difference(fa.aucs, b, a, labels)
        table["auc_macro_generated_over_real"] = bootstrap(
            lambda i: fa.macro_auc(b[i], labels[i]) / fa.macro_auc(a[i], labels[i]), len(labels)
        )
    return table | {"by_finding": each}


def alignment(clip: Clip, real: Seen, made: Seen, texts: list[str], labels: np.ndarray | None) -> Table:
    """CLIP3D between reports and volumes: the encoders' own quality on real volumes, and the model's on generated."""
    words, a, b = clip.texts(texts), real["embedding"], made["embedding"]
    table: Table = {}
    if labels is not None:
        present, absent = clip.sentences(al.PRESENT), clip.sentences(al.ABSENT)
        for name, x in (("zero_shot_auc", a), ("zero_shot_auc_generated", b)):
            table[name] = fa.averaged(fa.aucs, al.zero_shot_scores(x, present, absent), labels)[0]
        for k in al.RANKS:
            for name, found in (
                (f"map_at_{k}", al.precision_at(a, labels, a, labels, k, same=True)),
                (f"map_at_{k}_generated_to_real", al.precision_at(b, labels, a, labels, k)),
                (f"map_at_{k}_with_itself", al.precision_at(a, labels, a, labels, k, same=True, itself=True)),
            ):
                if np.isfinite(found).all():
                    table[name] = mean(found)
    for k in al.RANKS:
        if k < len(words):
            table[f"report_to_volume_r{k}"] = mean(al.found_within(words, a, k))
            table[f"report_to_generated_r{k}"] = mean(al.found_within(words, b, k))
    table["clip_score"] = mean(al.clip_scores(b, words))
    table["clip_score_of_real"] = mean(al.clip_scores(a, words))
    table["clip_score_to_real"] = mean(al.clip_scores(b, a))
    return table


def utility(scores: dict[str, np.ndarray], labels: np.ndarray) -> Table:
    """A classifier trained on real volumes, on generated ones, on both; tested on real ones that it never saw.

    scores: (M, 18) by each of the three (`crossed_scores`, `learnt_scores`); labels: (M, 18) of the same volumes.
    """
    table: Table = {
        f"auc_{name}": fa.averaged(fa.aucs, scores[key], labels)[0]
        for name, key in (("real", "real"), ("synthetic", "synthetic"), ("real_and_synthetic", "both"))
    }
    table["auc_gained_by_synthetic"] = difference(fa.aucs, scores["both"], scores["real"], labels)
    return table


def memorisation(real: Seen, made: Seen, known: Seen) -> tuple[Table, list[tuple[int, int]]]:
    """How near generated volumes come to training volumes, against how near unseen ones do; and the pairs (generated,
    training) that are nearest, in embedding space first."""
    table: Table = {}
    pairs: list[tuple[int, int]] = []
    for space, key in (("embedding", "embedding" if "embedding" in made else "features"), ("pixel", "pixels")):
        (_, unseen), (index, distances) = (nearest(s[key], known[key]) for s in (real, made))
        table[f"too_close_{space}"] = too_close(distances, unseen)
        table[f"nearest_{space}_generated"] = mean(distances)
        table[f"nearest_{space}_unseen"] = mean(unseen)
        pairs += [(int(i), int(index[i])) for i in np.argsort(distances)]
    half = len(pairs) // 2
    return table, [pair for two in zip(pairs[:half], pairs[half:], strict=True) for pair in two]


def setting(real: Seen, made: Seen, labels: np.ndarray | None) -> Table:
    """One point of a sweep: what Fig. 3 of the paper shows, FID and precision, and the AUC."""
    table: Table = {
        "fid_3d_of_n": distance(frechet, real["features"], made["features"]),
        "kid_3d": distance(kid, real["features"], made["features"]),
    }
    if labels is not None and measurable(labels):
        p = probabilities(made)
        table["auc_macro"] = fa.averaged(fa.aucs, p, labels)[0]
        table["precision_macro"] = fa.averaged(fa.precisions, p, labels)[0]
    return table


def nearer(real: Seen, first: Seen, second: Seen) -> Table:
    """How much further from the real volumes the second set is than the first; below 0: nearer."""
    a, b = first["features"], second["features"]
    both = np.concatenate([a, b], 1)  # halved together

    def more(statistic: Callable) -> Estimate:
        width = a.shape[1]
        return distance(lambda x, y: statistic(x, y[:, width:]) - statistic(x, y[:, :width]), real["features"], both)

    return {"fid_3d": more(frechet_infinity), "kid_3d": more(kid)}


def _share(right: np.ndarray, cases: np.ndarray) -> Estimate:
    """Of the cases of all volumes, how many are right; n: cases, drawn volume by volume for the interval."""
    found = bootstrap(lambda i: right[i].sum() / cases[i].sum() if cases[i].sum() else float("nan"), len(cases))
    return replace(found, n=int(cases.sum()))


def difference(figures: fa.Figures, scores: np.ndarray, against: np.ndarray, labels: np.ndarray) -> Estimate:
    """Macro mean of `figures` of scores minus that of `against`, the same volumes drawn for both."""
    return bootstrap(
        lambda i: fa.macro(figures(scores[i], labels[i])) - fa.macro(figures(against[i], labels[i])), len(labels)
    )


def probabilities(seen: Seen) -> np.ndarray:
    """The judge's, (N, 18) float64."""
    return 1 / (1 + np.exp(-seen["logits"].astype(np.float64)))


def measurable(labels: np.ndarray) -> list[int]:
    """Findings that some volumes have and some lack."""
    cases = labels.sum(0)
    return [k for k in range(labels.shape[1]) if SPARE <= cases[k] <= len(labels) - SPARE]


def left_out(labels: np.ndarray) -> str | None:
    """Which findings have no figure, and why, in words."""
    gone = [LABELS[k] for k in range(labels.shape[1]) if k not in measurable(labels)]
    if not gone:
        return None
    return f"{len(gone)} findings that no volume, or every volume, has are left out: {', '.join(gone)}"
