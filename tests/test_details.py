"""Side, lobe and size of findings: read from reports, turned in a mirror, learnt by the judge."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from t2ct.data.phantoms import FINDINGS, Finding, describe
from t2ct.data.phantoms.reports.details import ASPECTS, DETAILS, MIRRORED, details_of, details_told, right_by_kind
from t2ct.models.judge import Judge, JudgeConfig, load_judge
from t2ct.train.config import JudgeTraining
from t2ct.train.data.phantoms import draw_names
from t2ct.train.data.source import Entry, Item
from t2ct.train.judge import Cases, JudgeRecipe, known_details
from t2ct.train.loop import run

pytestmark = pytest.mark.usefixtures("one_thread")

RIGHT, LEFT = (DETAILS.index(f"pleural effusion: side {side}") for side in ("right", "left"))
SMALL = JudgeConfig(size=(16, 16, 16), channels=(8, 16), details=DETAILS)


def test_what_reports_tell_is_what_was_drawn():
    """Where a report is clear it is right; diameters at a border between two classes are rounded."""
    compared = 0
    for seed in range(150):
        drawn = describe(seed, draw_names(seed))
        mm = [f.size_mm for f in drawn.present if f.size_mm]
        if any(abs(v - border) <= 0.5 for v in mm for border in (12.5, 20)):
            continue
        told, truth = details_told(drawn.prompt), details_of(drawn.present)
        known = np.isfinite(told)
        assert np.isfinite(truth[known]).all() and (told[known] == truth[known]).all(), drawn.prompt
        compared += known.sum()
    assert compared > 1000


def test_words_become_answers():
    told = details_told("Large right pleural effusion. 8 mm nodule in the left upper lobe. No cardiomegaly.")
    yes = {DETAILS[i] for i in np.flatnonzero(told == 1)}
    assert yes == {
        "pleural effusion: side right", "pleural effusion: size large", "lung nodule: side left",
        "lung nodule: lobe upper", "lung nodule: size small",
    }  # fmt: skip
    assert np.isnan(told[[i for i, name in enumerate(DETAILS) if name.startswith("cardiomegaly")]]).all()
    both = details_of([Finding("pleural effusion", side="bilateral")])
    assert both[RIGHT] == both[LEFT] == 1
    lobes = [i for i, name in enumerate(DETAILS) if name.startswith("lung nodule: lobe")]
    two = details_of([Finding("lung nodule", "left", "upper"), Finding("lung nodule", "left", "lower")])
    assert np.isnan(two[lobes]).all() and two[DETAILS.index("lung nodule: side left")] == 1
    assert {a.finding for a in ASPECTS} <= set(FINDINGS) and len(set(DETAILS)) == len(DETAILS)


def test_a_mirror_exchanges_sides_and_nothing_else():
    here = [Finding("pleural effusion", "right", None, "large"), Finding("consolidation", "left", "lower", "lobar")]
    there = [replace(f, side={"right": "left", "left": "right"}[f.side]) for f in here]
    assert np.array_equal(details_of(here)[MIRRORED], details_of(there), equal_nan=True)
    assert np.array_equal(np.arange(len(DETAILS))[MIRRORED][MIRRORED], np.arange(len(DETAILS)))
    entry = Entry("a", (), (0,) * 18, tuple(details_of(here).tolist()))

    class Source:
        entries = [entry]

    item = Item(np.arange(16**3, dtype=np.int16).reshape(16, 16, 16), (1.0,) * 3)
    still, seen = JudgeTraining(model=SMALL, flip=True, move=0, shift_hu=0.0), set()
    for n in range(8):
        made = Cases(Source(), still)(item, (0, n, 0))
        mirrored = made["hu"][0, 0, 0, 0] > made["hu"][0, -1, 0, 0]
        assert np.array_equal(made["details"], details_of(there if mirrored else here), equal_nan=True)
        seen.add(bool(mirrored))
    assert seen == {True, False}
    assert "details" not in Cases(Source(), JudgeTraining())(item, (0, 0, 0))  # nobody asks: no report is read


def test_shares_of_what_is_right():
    truth = np.stack([
        details_of([Finding("pleural effusion", "right", None, "small")]),
        details_of([Finding("pleural effusion", "bilateral", None, "large"), Finding("lung nodule", "left", "lower")]),
        details_of([]),
    ])  # fmt: skip
    perfect = np.where(truth == 1, 2.0, -2.0)
    for kind, (right, cases) in right_by_kind(perfect, truth).items():
        assert right.tolist() == cases.tolist() == {"side": [1, 2, 0], "lobe": [0, 1, 0]}.get(kind, [1, 1, 0])
    wrong = right_by_kind(-perfect, truth)
    assert wrong["side"][0].sum() == wrong["lobe"][0].sum() == wrong["size"][0].sum() == 0
    size = next(a for a in ASPECTS if (a.finding, a.kind) == ("pleural effusion", "size"))
    near = perfect.copy()
    near[0, size.start + size.values.index("moderate")] = 3
    near[1, size.start + size.values.index("trace")] = 3
    found = right_by_kind(near, truth)
    assert found["size"][0].tolist() == [0, 0, 0] and found["size_within_one_class"][0].tolist() == [1, 0, 0]
    assert not right_by_kind(perfect[:, ::-1], np.full_like(truth, np.nan))["side"][1].any()


def test_what_is_recorded_goes_before_what_is_told():
    told = "Right pleural effusion."
    recorded = tuple(details_of([Finding("pleural effusion", "left")]).tolist())
    assert known_details(Entry("a", (told,)))[RIGHT] == 1
    assert known_details(Entry("a", (told,), None, recorded))[RIGHT] == 0
    assert known_details(Entry("a", ())).isnan().all()


class Sides:
    """Volumes with a bright block on the right or on the left; the report tells where."""

    size = (16, 16, 16)

    def __init__(self, first, count):
        self.seeds = range(first, first + count)
        self.entries = [
            Entry(str(s), (f"{('Right', 'Left')[s % 2]} pleural effusion.",), (*[0] * 12, 1, *[0] * 5))
            for s in self.seeds
        ]

    def __len__(self):
        return len(self.seeds)

    def read(self, index):
        rng = np.random.default_rng(self.seeds[index])
        hu = rng.normal(0, 30, self.size)
        y, z = rng.integers(2, 12, 2)
        x = rng.integers(8, 13) if self.seeds[index] % 2 == 0 else rng.integers(0, 5)
        hu[x : x + 3, y : y + 3, z : z + 3] += 500
        return Item(hu.astype(np.int16), (1.0,) * 3)


def test_a_judge_learns_sides(tmp_path):
    config = JudgeTraining(
        model=SMALL, steps=250, batch=8, learning_rate=5e-3, ema=0.8, valid_count=32, precision="float32", move=0,
        detail_weight=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="nothing to learn of 18 findings"):
        recipe = JudgeRecipe(config, Judge(SMALL), Sides(0, 200), Sides(1000, 32))
    run(recipe, config, tmp_path, torch.device("cpu"), 8, quiet=True)
    judge, truth = load_judge(tmp_path), Sides(2000, 40)
    assert judge.config.details == DETAILS
    hu = torch.from_numpy(np.stack([truth.read(i).hu for i in range(40)])).float()[:, None]
    said = judge.details(judge.features(hu)).numpy()
    right, cases = right_by_kind(said, np.stack([details_told(e.texts[0]) for e in truth.entries]))["side"]
    assert cases.sum() == 40 and right.sum() >= 38


def test_other_questions_are_refused():
    other = replace(SMALL, details=("pleural effusion: side right",))
    with pytest.raises(ValueError, match="model.details: wanted none, or those of"):
        JudgeRecipe(JudgeTraining(model=other), Judge(other), None)
    plain = Judge(replace(SMALL, details=()))
    assert plain.details(torch.zeros(2, plain.num_features)).shape == (2, 0)
