"""Are the volumes of use for training? A linear probe on frozen features, trained on real, synthetic and both."""

from __future__ import annotations

import numpy as np
import torch

PENALTY = 1.0  # on half the squared weights, beside the summed log loss: scikit-learn's C = 1
SETS = ("real", "synthetic", "both")


def probe(features: np.ndarray, labels: np.ndarray, others: np.ndarray, penalty: float = PENALTY) -> np.ndarray:
    """Logistic regressions of every finding, fitted to features (N, F) and labels (N, L): logits (M, L) of `others`.

    Features are standardised by the training set's mean and deviation; the intercept is not penalised. The loss is
    convex and minimised in float64 (L-BFGS) to gradients below 1e-7 a volume: the same input gives the same result.
    """
    centre, scale = features.mean(0), features.std(0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    x, z = (torch.from_numpy((np.asarray(v, float) - centre) / scale) for v in (features, others))
    y = torch.from_numpy(np.asarray(labels, float))
    weight = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(y.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-7, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        solver.zero_grad()
        log_loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ weight + bias, y, reduction="sum")
        value = (log_loss + penalty / 2 * weight.square().sum()) / len(x)
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return (z @ weight + bias).numpy()


def halves(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the reports that are learnt from, and of those that are tested."""
    order = np.random.default_rng([seed, n]).permutation(n)
    return np.sort(order[: n // 2]), np.sort(order[n // 2 :])


def crossed_scores(real: np.ndarray, synthetic: np.ndarray, labels: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Scores of the real volumes (N, L) by probes trained on real, synthetic and both, never on the volume itself.

    real, synthetic (N, F): features of the volume of report i and of what was generated from it. The reports are dealt
    into two halves; probes learn from one and are tested on the real volumes of the other, and the reverse. No
    synthetic volume whose report's patient is tested takes part, and all three learn from the same patients.
    """
    scores = {name: np.zeros(labels.shape) for name in SETS}
    a, b = halves(len(labels), seed)
    for learn, test in ((a, b), (b, a)):
        sets = {
            "real": (real[learn], labels[learn]),
            "synthetic": (synthetic[learn], labels[learn]),
            "both": (np.concatenate([real[learn], synthetic[learn]]), np.concatenate([labels[learn], labels[learn]])),
        }
        for name, (x, y) in sets.items():
            scores[name][test] = probe(x, y, real[test])
    return scores
