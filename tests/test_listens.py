"""The image measurements, and the table that says whether a model listens."""

import json
from functools import lru_cache

import numpy as np
import pytest

from t2ct.data.phantoms import Finding, phantom
from t2ct.eval import listens as module
from t2ct.eval.grid import coarsen
from t2ct.eval.listens import PROMPT_SEED, auc, listens, main, visible
from t2ct.eval.measure import ANATOMY, RULES, frame, measure
from t2ct.eval.morphology import box_opening, line, opening, outside, shifted, smooth

SIZE, SPACING = (64, 64, 32), (5.5, 5.5, 10.0)
CLEAR = {
    "pleural effusion": Finding("pleural effusion", side="left", size="large"),
    "cardiomegaly": Finding("cardiomegaly", size="severe"),
    "emphysema": Finding("emphysema", size="severe", kind="centrilobular"),
    "lung nodule": Finding("lung nodule", side="right", lobe="upper", size_mm=28, count=1),
    "pericardial effusion": Finding("pericardial effusion", size="large"),
    "arterial wall calcification": Finding("arterial wall calcification", size="severe"),
    "hiatal hernia": Finding("hiatal hernia", size="large"),
}


@lru_cache(maxsize=256)
def draw(seed, *findings):
    return phantom(seed, list(findings), SIZE)


def values(seed, *findings):
    return measure(draw(seed, *findings).hu, SPACING)


@pytest.fixture(autouse=True)
def draw_once(monkeypatch):
    """The phantoms of a seed are the same for every pipe."""
    monkeypatch.setattr(module, "_draw", lambda pipe, seed: draw(seed, *visible(seed)))


class FakePipe:
    """Draws phantoms instead of sampling: of the prompt's own findings if it listens, of none if it is deaf."""

    name, weights_hash, size, spacing, device = "fake", "0123abcd", SIZE, SPACING, "cpu"

    def __init__(self, hears, other_patient=True, extra_hu=0.0):
        self.hears, self.other_patient, self.extra_hu, self.seeds = hears, other_patient, extra_hu, []

    def estimate_seconds(self, num_inference_steps):
        return 0.01 * num_inference_steps

    def __call__(self, prompts, *, num_inference_steps, guidance_scale, generator, output_type, progress):
        assert output_type == "np" and len(prompts) > 0
        self.seeds.append(generator)
        out = []
        for k, prompt in enumerate(prompts, start=PROMPT_SEED + generator):
            asked = draw(k, *visible(k))
            assert prompt == asked.prompt
            # Another patient with the same findings; what the VAE of a model does to it is a little blur.
            shown = draw(k + 200_000 * self.other_patient, *(asked.present if self.hears else ()))
            hu = 0.5 * shown.hu + 0.5 * smooth(shown.hu.astype(np.float32), (0, 1))
            out.append(hu + self.extra_hu)
        return np.stack(out)


# --- morphology ---------------------------------------------------------------------------------------------------


def test_smooth_is_the_mean_of_27_neighbours():
    volume = np.random.default_rng(0).normal(size=(6, 7, 8)).astype(np.float32)
    want = np.mean([np.pad(volume, 1, mode="edge")[i : i + 6, j : j + 7, k : k + 8]
                    for i in range(3) for j in range(3) for k in range(3)], axis=0)  # fmt: skip
    assert np.abs(smooth(volume) - want).max() <= 1e-5


def test_openings_keep_what_holds_the_element():
    ndimage = pytest.importorskip("scipy.ndimage")
    volume = np.random.default_rng(1).normal(size=(12, 11, 9))
    inner = (slice(4, -4),) * 2 + (slice(3, -3),)
    assert np.array_equal(box_opening(volume, (3, 5, 3))[inner], ndimage.grey_opening(volume, (3, 5, 3))[inner])
    bar = np.zeros((9, 9, 9))
    bar[1:8, 4, 4] = 1
    along, across = line((1, 0, 0), 6, (1, 1, 1)), line((0, 1, 0), 6, (1, 1, 1))
    assert along == [(k, 0, 0) for k in range(-3, 4)]
    assert np.array_equal(opening(bar, along), bar) and opening(bar, across).max() == 0
    assert shifted(bar, (1, 0, 0), 0).sum() == 7 and shifted(bar, (2, 0, 0), 0).sum() == 6


def test_outside_stops_at_a_closed_ring():
    tissue = np.zeros((9, 9, 2), bool)
    tissue[2:7, 2:7] = True
    tissue[3:6, 3:6] = False
    tissue[6, 4, 1] = False  # a gate in the second slice
    free = outside(tissue)
    assert not free[4, 4, 0] and free[4, 4, 1] and free[0, 0].all() and not free[tissue].any()


# --- measurements -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_a_clear_case_is_told_from_a_normal_chest(name):
    rule = RULES[name]
    for seed in (400_001, 400_002, 400_003):
        normal, ill = values(seed), values(seed, CLEAR[name])
        assert rule.present(ill) and not rule.present(normal)
        assert rule.score(ill) > rule.score(normal)


@pytest.mark.parametrize("side, sign", [("right", 1), ("left", -1)])
def test_effusion_has_its_side(side, sign):
    got = values(400_004, Finding("pleural effusion", side=side, size="moderate"))
    assert sign * (got["effusion right"] - got["effusion left"]) > 50
    assert got["effusion"] == max(got["effusion right"], got["effusion left"])


def test_more_fluid_measures_more():
    got = [values(400_005, Finding("pleural effusion", side="right", size=s))["effusion"]
           for s in ("trace", "moderate", "large")]  # fmt: skip
    assert got[0] < got[1] < got[2]


def test_anatomy_agrees_with_the_mask():
    p = draw(400_006)
    from t2ct.data.phantoms import ORGANS

    got = measure(p.hu, SPACING)
    for what, organs in (("lung HU", ("right lung", "left lung")), ("liver HU", ("liver",)), ("heart HU", ("heart",))):
        truth = np.median(p.hu[np.isin(p.mask, [ORGANS.index(o) for o in organs])])
        assert abs(got[what] - truth) <= 30, what
    inside = ~np.isin(p.mask, [ORGANS.index("background"), ORGANS.index("table")])
    body = frame(p.hu, SPACING).body
    assert 2 * (inside & body).sum() / (inside.sum() + body.sum()) >= 0.97
    assert got["body area"] == pytest.approx(body.sum() * 5.5 * 5.5 / 100 / 32)


def test_every_number_is_finite_whatever_the_volume():
    keys = set(values(400_006))
    assert keys >= {rule.measurement for rule in RULES.values()} | set(ANATOMY)
    noise = np.random.default_rng(0).normal(0, 500, SIZE)
    for hu in (np.full(SIZE, -1000), np.zeros(SIZE), np.full(SIZE, 1000, np.int16), noise):
        got = measure(hu, SPACING)
        assert set(got) == keys and np.isfinite(list(got.values())).all()


@pytest.mark.parametrize(
    "hu, spacing, word",
    [
        (np.zeros((64, 64)), SPACING, "hu"),
        (np.zeros((16, 64, 32)), SPACING, "hu"),
        (np.full(SIZE, np.nan), SPACING, "finite"),
        (np.zeros(SIZE), (0.75, 0.75, 1.5), "spacing"),
        (np.zeros(SIZE), (5.5, 5.5), "spacing"),
        (np.zeros(SIZE), (5.5, 5.5, np.nan), "spacing"),
    ],
)
def test_measure_refuses(hu, spacing, word):
    with pytest.raises(ValueError, match=word):
        measure(hu, spacing)


# --- the table ----------------------------------------------------------------------------------------------------


def test_auc_against_counting_pairs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        s, y = rng.integers(0, 6, 30).astype(float), rng.random(30) < 0.4
        pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in s[y] for b in s[~y]]
        assert auc(s, y) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert auc([1, 2, 3], [False, True, True]) == 1 and auc([1, 1], [True, False]) == 0.5
    assert np.isnan(auc([1, 2], [True, True]))
    for bad in ([1, np.nan], [1, 2, 3]):
        with pytest.raises(ValueError, match="scores"):
            auc(bad, [True, False])


def test_visible_findings_are_visible_and_reproducible():
    seen = [f for seed in range(PROMPT_SEED, PROMPT_SEED + 200) for f in visible(seed)]
    assert {f.name for f in seen} >= set(RULES) | {"consolidation", "atelectasis"}
    for f in seen:
        assert f.name not in module.VISIBLE or f.size in module.VISIBLE[f.name]
        assert f.name != "lung nodule" or 20 <= f.size_mm <= 30
    assert visible(PROMPT_SEED) == visible(PROMPT_SEED)


def test_a_pipe_that_listens_and_one_that_is_deaf():
    count = 12
    hears, deaf = (listens(FakePipe(h), prompts=count, phantoms=1, batch=6, progress=False) for h in (True, False))
    good = {r.what: r for r in hears.model}
    assert len(good) == len(RULES) + 6
    findings = [f"{name}: AUC" for name in RULES]
    known = [what for what in findings if np.isfinite(good[what].value)]
    assert len(known) >= 5
    assert np.mean([good[what].value for what in known]) >= 0.9
    poor = {r.what: r.value for r in deaf.model}
    assert 0.2 <= np.mean([poor[what] for what in known]) <= 0.75
    assert good["pleural effusion: right side"].met
    assert all(r.met for r in hears.model if "difference" in r.what or "outline" in r.what)


def test_a_shift_of_all_hu_is_seen():
    for shift in (0, 60):
        pipe = FakePipe(True, other_patient=False, extra_hu=shift)
        report = listens(pipe, prompts=2, phantoms=1, progress=False)
        rows = {r.what: r for r in report.model}
        for what in ("lung HU", "liver HU", "heart HU"):
            assert rows[f"{what}: difference of means"].met == (shift == 0)
            value = rows[f"{what}: difference of means"].value
            assert value == pytest.approx(shift, abs=30)  # the blur adds some at the borders of the lungs
        assert all(not r.met for r in report.model if not np.isfinite(r.value))


def test_batches_carry_the_index_of_their_first_prompt_as_seed():
    pipe = FakePipe(False)
    listens(pipe, prompts=5, phantoms=1, batch=2, progress=False)
    assert pipe.seeds == [0, 2, 4]


def test_command_writes_the_table(tmp_path, capsys):
    for name in ("listens.md", "listens.json"):
        target = tmp_path / name
        arguments = ["--prompts", "2", "--phantoms", "2", "--steps", "3", "--output", str(target)]
        assert main(arguments, load=lambda model: FakePipe(False)) == 0
        told = capsys.readouterr().out
        assert "about" in told and "| target |" in told and "0123abcd" in told and "missed" in told
        text = target.read_text()
        if name.endswith("json"):
            assert json.loads(text)["weights"] == "0123abcd" and len(json.loads(text)["phantoms"]) == len(RULES)
        else:
            assert text in told
    assert sorted(p.name for p in tmp_path.iterdir()) == ["listens.json", "listens.md"]


@pytest.mark.parametrize("arguments", [["--prompts", "0"], ["--batch", "x"], ["--output", "/no/such/folder/a.md"]])
def test_command_refuses_in_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments, load=lambda model: FakePipe(False))
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("python -m t2ct.eval.listens: error: ")


def test_listens_refuses_a_grid_it_cannot_measure():
    pipe = FakePipe(False)
    pipe.spacing = (0.75, 0.75, 1.5)
    with pytest.raises(ValueError, match="at least 32 x 32 x 16"):
        listens(pipe, prompts=1, phantoms=1, progress=False)


def test_finer_volumes_are_averaged_onto_the_grid():
    hu = np.random.default_rng(0).normal(size=(96, 96, 48)).astype(np.float32)
    mm = (352 / 96, 352 / 96, 320 / 48)
    coarse, spacing = coarsen(hu, mm)
    assert coarse.shape == (64, 64, 32) and spacing == pytest.approx((5.5, 5.5, 10.0))
    assert coarse.mean() == pytest.approx(hu.mean(), abs=1e-5)
    first = np.array([1, 0.5]) / 1.5  # a coarse cell holds one fine cell and half of the next
    expected = np.einsum("i,j,k,ijk", first, first, first, hu[:2, :2, :2].astype(float))
    assert coarse[0, 0, 0] == pytest.approx(expected, abs=1e-5)
    same, spacing = coarsen(coarse, (5.5, 5.5, 10.0))
    assert np.array_equal(same, coarse) and spacing == (5.5, 5.5, 10.0)


@pytest.mark.slow
def test_measurements_are_right_on_200_phantoms():
    """Accuracy >= 0.95 on phantoms that neither training nor the choice of thresholds has seen."""
    pipe = FakePipe(True)
    for row in module._prove(pipe, range(200)):
        print(row)
        assert row.value >= 0.95, row
