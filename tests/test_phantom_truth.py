"""Masks, vessels, noise and HU of phantoms: what is drawn is what is said, and it obeys the laws it claims."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from t2ct.data.phantoms import FINDINGS, ORGANS, PARTS, finding_sheet, phantom
from t2ct.data.phantoms.anatomy import draw_anatomy
from t2ct.data.phantoms.chest import grow_trees
from t2ct.data.phantoms.hounsfield import REFERENCE, SOURCES, inner, markdown, measure
from t2ct.data.phantoms.organs import FINDING_BITS
from t2ct.data.phantoms.scanner import Kernel, add_noise
from t2ct.data.phantoms.trees import bronchi

SMALL, GRID = (64, 64, 32), (96, 96, 48)
# One of every finding that shows on a coarse grid, with its side where it has one.
CLEAR = {
    "medical material": {"kind": "pacemaker", "side": "left"},
    "coronary artery wall calcification": {"size": "severe", "kind": "multivessel"},
    "hiatal hernia": {"size": "moderate"},
    "lymphadenopathy": {"kind": "hilar", "side": "right", "size": "severe"},
    "lung opacity": {"side": "left", "lobe": "lower", "size": "extensive"},
    "pulmonary fibrotic sequela": {"side": "right", "lobe": "upper", "size": "severe"},
    "mosaic attenuation pattern": {"size": "severe"},
    "peribronchial thickening": {"side": "right", "size": "severe"},
    "bronchiectasis": {"side": "left", "lobe": "lower", "size": "severe"},
    "interlobular septal thickening": {"side": "right", "size": "severe"},
    "lung nodule": {"side": "right", "lobe": "upper", "size_mm": 20, "count": 1},
    "consolidation": {"side": "left", "lobe": "lower"},
    "pleural effusion": {"side": "right", "size": "moderate"},
    "emphysema": {"size": "severe"},
    "atelectasis": {"side": "left", "kind": "lobar"},
    "cardiomegaly": {"size": "severe"},
    "pericardial effusion": {"size": "large"},
    "arterial wall calcification": {"size": "severe"},
}


@lru_cache(maxsize=64)
def draw(seed, name=None, size=GRID):
    return phantom(seed, [] if name is None else [{"name": name, **CLEAR[name]}], size)


@pytest.mark.parametrize("name", FINDINGS)
def test_every_finding_has_a_mask_where_it_changed_the_image(name):
    """Most of what changed lies in or beside the mask, and the mask is on the side and in the lobe that is said."""
    for seed in (1, 2):
        ill, well = draw(seed, name), draw(seed)
        mask = ill.finding_mask(name)
        assert mask.sum() >= 5 and not well.finding_mask(name).any()
        change = np.abs(ill.hu.astype(float) - well.hu)
        assert change[mask].mean() > 3 * change[~mask].mean(), seed
        side = CLEAR[name].get("side")
        if side and name != "medical material":  # leads cross over
            right = np.argwhere(mask)[:, 0].mean() > mask.shape[0] / 2
            assert right == (side == "right"), seed
        if "lobe" in CLEAR[name]:
            lobe = well.organ_mask(f"{side} {CLEAR[name]['lobe']} lobe")
            assert (mask & lobe).sum() > 0.6 * mask.sum(), seed


# HU that the middle of a finding has at 3.7 mm voxels, partial volumes included.
WANTED_HU = {
    "medical material": (900, 3071), "coronary artery wall calcification": (130, 1200), "lymphadenopathy": (-20, 130),
    "lung opacity": (-680, -380), "pulmonary fibrotic sequela": (-500, 150), "bronchiectasis": (-880, -250),
    "mosaic attenuation pattern": (-940, -820), "interlobular septal thickening": (-760, -350),
    "peribronchial thickening": (-700, 60),
}  # fmt: skip


@pytest.mark.parametrize("name", WANTED_HU)
def test_hu_of_findings(name):
    low, high = WANTED_HU[name]
    for seed in (1, 2):
        p = draw(seed, name)
        assert low <= np.median(p.hu[p.finding_mask(name)]) <= high, seed


def test_hernia_has_gas_in_front_of_fluid_behind_the_heart():
    p = draw(4, "hiatal hernia")
    sac = p.finding_mask("hiatal hernia")
    gas, fluid = sac & (p.hu < -400), sac & (p.hu > -50)
    assert gas.sum() > 20 and fluid.sum() > 20
    assert np.argwhere(gas)[:, 1].mean() > np.argwhere(fluid)[:, 1].mean()
    assert np.argwhere(sac)[:, 1].mean() < np.argwhere(p.organ_mask("heart"))[:, 1].mean()


def test_bronchiectasis_is_wide_and_walled():
    """Air where there was lung, wall around it."""
    ill, well = phantom(3, [{"name": "bronchiectasis", "side": "right", "lobe": "lower", "size": "severe"}],
                        (160, 160, 96)), phantom(3, [], (160, 160, 96))  # fmt: skip
    mask = ill.finding_mask("bronchiectasis")
    change = ill.hu[mask].astype(int) - well.hu[mask]
    assert (change < -40).mean() > 0.1 and (change > 100).mean() > 0.15


def test_overlapping_findings_keep_their_masks():
    names = ["consolidation", "lung opacity", "interlobular septal thickening", "bronchiectasis"]
    asked = [{"name": "consolidation", "side": "right", "lobe": "lower", "size": "lobar"},
             {"name": "lung opacity", "side": "right", "lobe": "lower", "size": "extensive"},
             {"name": "interlobular septal thickening", "size": "severe"},
             {"name": "bronchiectasis", "side": "right", "lobe": "lower"}]  # fmt: skip
    together = phantom(6, asked, SMALL)
    for name, ask in zip(names, asked, strict=True):
        alone = phantom(6, [ask], SMALL).finding_mask(name)
        kept = together.finding_mask(name)
        assert (kept & alone).sum() > 0.6 * alone.sum(), name
    overlap = together.finding_mask("consolidation") & together.finding_mask("interlobular septal thickening")
    assert overlap.sum() > 5
    assert (together.organ_mask("right lower lobe") & together.finding_mask("consolidation")).sum() > 20


def test_masks_name_the_organs():
    p = draw(3, size=(128, 128, 64))
    here = {ORGANS[k] for k in np.unique(p.mask)} - {"background", "table"}
    parts = {PARTS[k] for k in np.unique(p.parts)} - {"none"}
    assert len(here) >= 26, sorted(here)
    assert len(parts) >= 34, sorted(set(PARTS) - parts)
    assert ORGANS[:24] == (
        "background", "fat", "muscle", "bone", "right lung", "left lung", "airway", "heart", "aorta",
        "pulmonary vessels", "vena cava", "oesophagus", "liver", "spleen", "stomach", "breast", "table",
        "pleural effusion", "pericardial effusion", "consolidation", "lung nodule", "emphysema", "atelectasis",
        "arterial wall calcification",
    )  # fmt: skip
    assert set(FINDING_BITS) == set(FINDINGS) and not set(ORGANS) & set(PARTS)
    for name in ("nose", "none", 3):
        with pytest.raises(ValueError, match="name: wanted one of"):
            p.organ_mask(name)
    with pytest.raises(ValueError, match="name: wanted one of .*got 'flu'"):
        p.finding_mask("flu")


def test_parts_lie_where_they_belong():
    p = draw(5)
    centre = {name: np.argwhere(p.organ_mask(name)).mean(0) for name in PARTS[1:] if p.organ_mask(name).any()}
    for right, left in (("right upper lobe", "left upper lobe"), ("right ribs", "left ribs"),
                        ("right clavicle", "left clavicle"), ("right main bronchus", "left main bronchus"),
                        ("right atrium", "left ventricle")):  # fmt: skip
        assert centre[right][0] > centre[left][0], right
    for high, low in (("right upper lobe", "right lower lobe"), ("aortic arch", "ascending aorta"),
                      ("trachea", "left main bronchus"), ("superior vena cava", "inferior vena cava")):  # fmt: skip
        assert centre[high][2] > centre[low][2], high
    for front, back in (("sternum", "vertebrae"), ("ascending aorta", "descending aorta"),
                        ("right ventricle", "left atrium"), ("right middle lobe", "right lower lobe")):  # fmt: skip
        assert centre[front][1] > centre[back][1], front


def test_vessels_and_bronchi_obey_murray():
    """The cubes of the radii of two branches add up to that of their parent; bronchi taper beside their arteries."""
    trees = grow_trees(draw_anatomy(np.random.default_rng(1)), np.random.default_rng(2))
    assert len(trees) == 5
    for arteries, veins in trees.values():
        for tree in (arteries, veins):
            for level in range(1, int(tree.level.max()) + 1):
                parents, children = tree.radius[tree.level == level - 1], tree.radius[tree.level == level]
                assert np.allclose(children[0::2] ** 3 + children[1::2] ** 3, parents**3, rtol=1e-4)
                assert np.allclose(tree.start[tree.level == level][::2], tree.end[tree.level == level - 1])
            assert 2 < tree.radius.max() < 6 and 0.2 < np.median(tree.radius) < 1.2  # mm
        tree = bronchi(arteries, 1.0)
        width = [tree.lumen[tree.level == k].mean() for k in range(6)]
        assert all(a > b for a, b in zip(width, width[1:], strict=False))
        assert 0.5 < np.mean(tree.lumen / tree.artery) < 0.8


def test_findings_leave_the_vessels_of_the_patient_alone():
    ill, well = draw(2, "cardiomegaly"), draw(2)
    lung = ill.organ_mask("right lung") & well.organ_mask("right lung")
    vessels = [p.hu[lung] > -500 for p in (ill, well)]
    assert (vessels[0] == vessels[1]).mean() > 0.99


def test_noise_has_the_spectrum_of_its_kernel():
    """A ramp at low frequencies, a Gaussian fall at high ones; the same scan in larger voxels is calmer."""
    rng, spacing = np.random.default_rng(0), (0.7, 0.7, 1.5)
    kernel = Kernel(0.8, 1.0, 0.5, 20.0)
    noise = add_noise(np.zeros((128, 128, 64), np.float32), spacing, kernel, rng)
    core = noise[40:88, 40:88]
    assert core[:, :, 24:40].std() == pytest.approx(20 * 1.1 * 0.86, rel=0.08)
    u = np.hypot(*np.meshgrid(np.fft.fftfreq(128, 0.7), np.fft.fftfreq(128, 0.7), indexing="ij"))
    power = (np.abs(np.fft.fft2(noise, axes=(0, 1))) ** 2).mean(2)
    wanted = u * np.exp(-((u / 0.5) ** 2))
    bands = [(0.04, 0.08), (0.1, 0.15), (0.2, 0.25), (0.3, 0.35), (0.4, 0.45), (0.55, 0.6)]
    ratios = [power[(u > a) & (u < b)].mean() / wanted[(u > a) & (u < b)].mean() for a, b in bands]
    pixel = [np.sinc(0.7 * (a + b) / 2 / np.sqrt(2)) ** 4 for a, b in bands]  # about: averaging over square pixels
    assert np.ptp(np.array(ratios) / pixel / np.mean(np.array(ratios) / pixel)) < 0.35
    assert power[(u > 0) & (u < 0.02)].mean() < 0.2 * power[(u > 0.3) & (u < 0.4)].mean()
    coarse = add_noise(np.zeros((64, 64, 32), np.float32), (2.8, 2.8, 6.0), kernel, rng)
    averaged = noise.reshape(32, 4, 32, 4, 16, 4).mean((1, 3, 5))  # slices are independent
    assert coarse[20:44, 20:44].std() < 0.3 * core.std()
    assert coarse[20:44, 20:44].std() == pytest.approx(averaged[10:22, 10:22].std(), rel=0.3)


def test_lung_is_denser_behind_and_its_texture_not_white():
    p = draw(7, size=(128, 128, 64))
    lung = inner(p.organ_mask("right lung"))
    y = np.argwhere(lung)[:, 1]
    back, front = (np.median(p.hu[lung][part]) for part in (y < np.quantile(y, 0.25), y > np.quantile(y, 0.75)))
    assert 10 < back - front < 80  # HU


def test_hu_of_organs_are_as_published():
    rows = measure(3)
    assert len(rows) == len(REFERENCE)
    assert all(r.inside for r in rows), [(r.organ.name, r.mean) for r in rows if not r.inside]
    text = markdown(rows)
    assert text.count("| yes |") == len(rows) and all(source in text for source in SOURCES)
    assert {k for r in rows for k in r.organ.sources} == set(range(1, len(SOURCES) + 1))


def test_inner_drops_the_surface():
    ball = np.zeros((7, 7, 7), bool)
    ball[1:6, 1:6, 1:6] = True
    assert inner(ball).sum() == 27 and not inner(np.ones((3, 3, 3), bool))[0].any()


def test_a_sheet_of_findings(tmp_path):
    from PIL import Image

    made = finding_sheet(tmp_path / "sheet.png", ["lung nodule", "medical material"], tile=40, size=(32, 32, 16))
    assert [p.present[0].name for p in made] == ["lung nodule", "medical material"]
    picture = Image.open(tmp_path / "sheet.png")
    assert picture.width >= 2 * 3 * 40 and picture.height >= 40
    pixels = np.asarray(picture.convert("L"))
    present, absent, difference = (pixels[:40, k * 42 : k * 42 + 40].astype(int) for k in range(3))
    assert (present != absent).any() and np.median(difference) in range(126, 131)
    with pytest.raises(ValueError, match="names: wanted some of .* got 'flu'"):
        finding_sheet(tmp_path / "no.png", ["flu"])


def test_the_docs_name_every_finding():
    text = (Path(__file__).resolve().parent.parent / "docs/phantoms.md").read_text()
    assert all(f"| {name} |" in text for name in FINDINGS)


@pytest.mark.slow
def test_the_table_in_the_docs_is_what_the_command_prints():
    assert markdown(measure()) in (Path(__file__).resolve().parent.parent / "docs/phantoms.md").read_text()
