"""The evaluation's figures on cases whose answers are known."""

import numpy as np
import pytest

from t2ct.eval.metrics import alignment, factual, memorisation, utility
from t2ct.eval.metrics.estimate import Estimate, bootstrap, half_samples, mean
from t2ct.eval.metrics.fidelity import (
    distance,
    distance_by_plane,
    frechet,
    frechet_infinity,
    fvd_in_strata,
    kid,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# Fidelity


def test_a_set_is_no_distance_from_itself():
    for n, f in ((300, 16), (20, 64)):  # more volumes than features, and fewer
        x = rng().normal(size=(n, f)) * np.logspace(0, -6, f)
        scale = (x * x).sum() / n
        assert abs(frechet(x, x)) < 1e-12 * scale
        assert abs(frechet(x, x[::-1])) < 1e-12 * scale
        assert abs(kid(x, x)) < 0.1


def test_frechet_against_the_closed_form():
    """Shifted and stretched samples whose moments are exact: |shift|² + sum of (s - t)² for commuting covariances."""
    x = rng().normal(size=(500, 6))
    x = np.linalg.qr(x - x.mean(0))[0] * np.sqrt(499)  # mean 0, covariance 1, exactly
    a, b = np.array([1, 2, 3, 0.5, 0, 1e-3]), np.array([2, 2, 1, 0.5, 1, 0])
    shift = np.array([0, 1, 0, -3, 0.5, 0])
    wanted = shift @ shift + ((a - b) ** 2).sum()
    assert frechet(x * a, x * b + shift) == pytest.approx(wanted, rel=1e-10)
    assert frechet(x * b + shift, x * a) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("n, m, f", [(400, 300, 12), (40, 60, 100)])
def test_frechet_against_a_matrix_square_root(n, m, f):
    linalg = pytest.importorskip("scipy.linalg")
    mix = rng(1).normal(size=(f, f))
    a, b = rng(2).normal(size=(n, f)) @ mix, rng(3).normal(size=(m, f)) + 0.3
    ca, cb = np.cov(a.T), np.cov(b.T)
    values, vectors = linalg.eigh(ca)
    half = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    root = np.sqrt(np.maximum(linalg.eigvalsh(half @ cb @ half), 0)).sum()
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * root
    # the root of a rounding error of 1e-16 is 1e-8: the oracle's own
    assert frechet(a, b) == pytest.approx(wanted, rel=1e-6 if n < f else 1e-10)
    if n > f:
        plain = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * linalg.sqrtm(ca @ cb).real)
        assert frechet(a, b) == pytest.approx(plain, rel=1e-8)


def test_the_extrapolation_takes_away_what_few_samples_add():
    """Two sets from one Gaussian are 0 apart; N volumes say c/N, the extrapolation nearly nothing."""
    plain, further = [], []
    for seed in range(12):
        a, b = rng(seed).normal(size=(2, 160, 12))
        plain.append(frechet(a, b))
        further.append(frechet_infinity(a, b, seed))
    assert np.mean(plain) > 0.3
    assert abs(np.mean(further)) < 0.15 * np.mean(plain)
    pairs = [rng(s).normal(size=(2, 160, 12)) + [[[0]], [[1]]] for s in range(8)]
    shifted = [frechet_infinity(a, b) for a, b in pairs]
    assert np.mean(shifted) == pytest.approx(12, rel=0.1)


def test_kid_against_its_definition_and_its_expectation():
    a, b = rng(0).normal(size=(7, 3)), rng(1).normal(size=(5, 3)) + 1

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    within = np.mean([k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
    within += np.mean([k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
    assert kid(a, b) == pytest.approx(within - 2 * np.mean([k(x, y) for x in a for y in b]), rel=1e-12)
    same = [kid(*rng(s).normal(size=(2, 20, 4))) for s in range(300)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(300)  # unbiased, for 20 samples too


def test_distances_are_those_of_torchmetrics():
    torch, fid = pytest.importorskip("torch"), pytest.importorskip("torchmetrics.image.fid")
    from torchmetrics.image.kid import poly_mmd

    a, b = rng(5).normal(size=(300, 24)), rng(6).normal(size=(300, 24)) * 1.5 + 0.2
    moments = [torch.from_numpy(m) for x in (a, b) for m in (x.mean(0), np.cov(x.T))]
    assert frechet(a, b) == pytest.approx(fid._compute_fid(*moments).item(), rel=1e-9)
    assert kid(a, b) == pytest.approx(poly_mmd(torch.from_numpy(a), torch.from_numpy(b)).item(), rel=1e-9)


def test_slices_are_rows_and_volumes_are_what_is_drawn():
    a, b = rng(0).normal(size=(2, 30, 3, 2, 5))  # 30 volumes, 3 planes, 2 slices, 5 features
    wanted = [frechet(a[:, p].reshape(60, 5), b[:, p].reshape(60, 5)) for p in range(3)]
    found = distance_by_plane(frechet, a, b)
    assert [f.value for f in found] == pytest.approx([np.mean(wanted), *wanted])
    assert all(f.n == 30 and f.low < f.value < f.high for f in found)


def test_interval_of_a_frechet_distance_holds_the_truth():
    """Of the distance extrapolated to infinitely many samples, between Gaussians whose distance has a closed form."""
    mean, scale = 0.6, 1.3
    truth = 6 * (mean**2 + (scale - 1) ** 2)
    inside, values = 0, []
    for s in range(30):
        a, b = rng(s).normal(size=(160, 6)), rng(200 + s).normal(size=(160, 6)) * scale + mean
        found = distance(frechet_infinity, a, b, seed=s)
        inside += found.low <= truth <= found.high
        values.append(found.value)
    assert inside >= 22 and np.mean(values) == pytest.approx(truth, rel=0.1)


def test_interval_of_a_distance_holds_the_truth():
    """95 % intervals of KID between two known Gaussians, whose value is known from many samples."""
    a, b = rng(7).normal(size=(4000, 4)), rng(8).normal(size=(4000, 4)) + 0.7
    truth = kid(a, b)
    inside = 0
    for s in range(40):
        found = distance(kid, rng(s).normal(size=(60, 4)), rng(100 + s).normal(size=(50, 4)) + 0.7, seed=s)
        assert found.n == 50
        inside += found.low <= truth <= found.high
    assert 30 <= inside <= 40


def test_strata_and_what_is_refused():
    a, b = rng(0).normal(size=(2, 10, 3))
    found = fvd_in_strata(a, b)
    assert found.n == 8 and found.value == pytest.approx(np.mean([frechet(a[:4], b[:4]), frechet(a[4:8], b[4:8])]))
    for x, y, word in ((a[:1], b, "at least 2"), (a, b[:, :2], "3 and 2"), (a * np.nan, b, "finite")):
        with pytest.raises(ValueError, match=word):
            frechet(x, y)
    with pytest.raises(ValueError, match="at least 4 volumes"):
        frechet_infinity(a[:3], b)


# Factual correctness


def test_auc_of_shuffled_labels_is_chance():
    scores, labels = rng(0).normal(size=(400, 18)), rng(1).random((400, 18)) < 0.3
    found, by_cases, each = factual.averaged(factual.aucs, scores, labels)
    assert len(each) == 18 and abs(by_cases.value - 0.5) < 0.03
    assert found.low < 0.5 < found.high and found.value == pytest.approx(0.5, abs=0.02) and found.n == 400
    assert factual.macro(factual.aucs(scores + 3 * labels, labels)) > 0.95


def test_findings_that_are_never_present_are_left_out():
    labels = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1], [0, 0, 1]])
    scores = np.array([[0.9, 0.2, 0.1], [0.8, 0.6, 0.2], [0.7, 0.1, 0.3], [0.1, 0.1, 0.4]])
    assert factual.aucs(scores, labels)[0] == 0.75 and np.isnan(factual.aucs(scores, labels)[1:]).all()
    found = factual.precisions(scores, labels)
    assert found[0] == pytest.approx(2 / 3) and np.isnan(found[1:]).all()
    assert factual.macro(found) == found[0] == factual.weighted(found, labels)
    assert np.isnan(factual.macro(found[1:])) and np.isnan(factual.weighted(found[1:], labels[:, 1:]))


def test_figures_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    y = rng(0).random((200, 5)) < [0.5, 0.3, 0.1, 0.02, 0.7]
    p = np.clip((0.3 * y + rng(1).random((200, 5))).round(2) / 1.3, 0, 1)  # with ties
    for name, average in (("macro", factual.macro), ("weighted", lambda values: factual.weighted(values, y))):
        assert average(factual.aucs(p, y)) == pytest.approx(metrics.roc_auc_score(y, p, average=name), abs=1e-12)
        wanted = metrics.precision_score(y, p > 0.5, average=name, zero_division=0)
        assert average(factual.precisions(p, y)) == pytest.approx(wanted, abs=1e-12)
    model = pytest.importorskip("sklearn.linear_model").LogisticRegression(tol=1e-10, max_iter=1000)
    x = rng(2).normal(size=(200, 4)) + y[:, :1]
    s = (x - x.mean(0)) / x.std(0)
    wanted = model.fit(s, y[:, 0]).decision_function(s)
    assert utility.probe(x, y[:, :1], x)[:, 0] == pytest.approx(wanted, abs=1e-5)


def test_weighted_means_weigh_by_the_positives():
    labels = np.array([[1, 1], [1, 0], [1, 0], [0, 0]])
    assert factual.weighted(np.array([1.0, 0.0]), labels) == 0.75
    assert (factual.precisions(np.zeros((4, 2)), labels) == 0).all()  # never predicted


def test_calibration():
    p = rng(0).random(200_000)
    honest = rng(1).random(200_000) < p
    assert factual.calibration_error(p, honest) < 0.01
    assert factual.calibration_error(p, rng(1).random(200_000) < p**2) == pytest.approx(1 / 6, abs=0.01)
    assert all(abs(x - y) < 0.02 for x, y in factual.reliability(p, honest))
    assert factual.calibration_error([1.0, 1.0, 0.0], [1, 0, 0]) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="from 0 to 1"):
        factual.calibration_error([2.0], [1])


# Alignment


def test_recall_of_pairs_of_permuted_pairs_and_of_embeddings_all_alike():
    x = unit(rng(0).normal(size=(500, 32)))
    assert alignment.found_within(x, x, 1).mean() == 1
    permuted = [alignment.found_within(x[rng(s).permutation(500)], x, 50).mean() for s in range(20)]
    assert np.mean(permuted) == pytest.approx(50 / 500, abs=0.01)  # chance
    assert alignment.found_within(np.ones((9, 2)), np.ones((9, 2)), 8).sum() == 0
    with pytest.raises(ValueError, match="as many reports as volumes"):
        alignment.found_within(x, x[:9], 1)


def test_precision_of_neighbours():
    labels = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 1]])
    assert alignment.shared_findings(labels, labels)[0].tolist() == [1, 0.5, 0, pytest.approx(1 / 3)]
    x = unit(np.array([[1.0, 0], [1, 0.1], [0, 1], [0.3, 1]]))
    args = x, labels, x, labels
    # as the published script: each finds itself, the one without findings counts as 0
    assert alignment.precision_at(*args, 1, same=True, itself=True).tolist() == [1, 1, 0, 1]
    # 0 finds 1, 1 finds 0, 3 finds 1
    assert alignment.precision_at(*args, 1, same=True).tolist() == [0.5, 0.5, 0]
    assert np.isnan(alignment.precision_at(*args, 3, same=True)).all()  # two others alone have findings
    assert alignment.precision_at(*args, 1).tolist() == [1, 1, 1]  # another set, which happens to be equal


def test_zero_shot_and_clip_scores():
    labels = rng(0).random((300, 4)) < 0.5
    present = unit(rng(1).normal(size=(4, 64)))
    volumes = unit(labels @ present + 0.01 * rng(2).normal(size=(300, 64)))
    scores = alignment.zero_shot_scores(volumes, present, np.zeros_like(present))
    assert factual.macro(factual.aucs(scores, labels)) > 0.95
    chance = alignment.zero_shot_scores(volumes, *unit(rng(3).normal(size=(2, 4, 64))))
    assert np.isfinite(chance).all()
    a = np.array([[1.0, 0], [1, 0], [1, 0]])
    assert alignment.clip_scores(a, np.array([[1.0, 0], [-1, 0], [0.6, 0.8]])).tolist() == [100, 0, 60]


# Utility and memorisation


def test_probe_is_the_minimum_of_its_loss():
    optimize = pytest.importorskip("scipy.optimize")
    x, z = rng(0).normal(size=(80, 3)) * [1, 5, 0.1] + 2, rng(1).normal(size=(9, 3))
    y = (rng(2).random((80, 1)) < 1 / (1 + np.exp(-x[:, :1] + 2))).astype(float)
    s = (x - x.mean(0)) / x.std(0)

    def loss(p):
        logits = s @ p[:3] + p[3]
        return np.logaddexp(0, logits).sum() - (logits * y[:, 0]).sum() + (p[:3] ** 2).sum() / 2

    best = optimize.minimize(loss, np.zeros(4), tol=1e-12).x
    wanted = ((z - x.mean(0)) / x.std(0)) @ best[:3] + best[3]
    assert utility.probe(x, y, z)[:, 0] == pytest.approx(wanted, abs=1e-4)
    assert np.array_equal(utility.probe(x, y, z), utility.probe(x, y, z))


def test_utility_of_useful_useless_and_wrong_volumes():
    labels = rng(0).random((200, 3)) < 0.4
    weight = rng(1).normal(size=(3, 20))

    def features(seed, of):
        return of @ weight * 0.8 + rng(seed).normal(size=(200, 20))

    def score(synthetic):
        scores = utility.crossed_scores(features(2, labels), synthetic, labels)
        return {k: factual.macro(factual.aucs(s, labels)) for k, s in scores.items()}

    good, useless, wrong = score(features(3, labels)), score(rng(4).normal(size=(200, 20))), score(features(5, ~labels))
    assert good["both"] > good["real"] > 0.8 and good["synthetic"] > 0.8
    assert abs(useless["synthetic"] - 0.5) < 0.2 and useless["real"] == good["real"]
    assert wrong["synthetic"] < 0.3


def test_copies_are_found():
    known, unseen = rng(0).normal(size=(300, 10)), rng(1).normal(size=(200, 10))
    index, far = memorisation.nearest(unseen, known)
    brute = np.sqrt(((unseen[:, None] - known[None]) ** 2).mean(2))
    assert np.array_equal(index, brute.argmin(1)) and far == pytest.approx(brute.min(1))
    copies, near = memorisation.nearest(known[:50] + 1e-9, known)
    assert copies.tolist() == list(range(50)) and near == pytest.approx(1e-9, rel=1e-3)
    assert memorisation.too_close(near, far).value == 1
    fresh = memorisation.too_close(memorisation.nearest(rng(2).normal(size=(200, 10)), known)[1], far)
    assert fresh.low <= 0.06 and fresh.value < 0.12
    with pytest.raises(ValueError, match="of one length"):
        memorisation.nearest(known, known[:, :3])


# Intervals


def test_intervals_hold_the_truth():
    inside = [0, 0, 0]
    for s in range(100):
        x = rng(s).exponential(size=80)
        for k, found in enumerate(
            (
                mean(x, 400),
                bootstrap(lambda i, x=x: float(x[i].mean()), 80, 300),
                half_samples(lambda i, x=x: float(x[i].mean()), 80),
            )
        ):
            inside[k] += found.low <= 1 <= found.high
    assert all(84 <= k <= 100 for k in inside)


def test_what_has_no_interval():
    one = mean(np.array([3.0]))
    assert one.value == 3 and np.isnan(one.low) and one.n == 1
    assert one.as_dict() == {"value": 3.0, "low": None, "high": None, "n": 1}
    assert str(Estimate(float("nan"), 0, 0, 3)) == "not measurable" and str(one) == "3.000"
    assert np.isnan(half_samples(lambda i: 1.0, 5).low)
    assert np.isnan(bootstrap(lambda i: float("nan"), 50).value)
