"""Phantoms: same bits from the same seed, the truth that they claim, and errors that say what was wanted."""

import time

import numpy as np
import pytest

from t2ct.data.phantoms import FINDINGS, LABELS, ORGANS, Finding, contact_sheet, phantom

SMALL = (64, 64, 32)
VOXEL_ML = 352 * 352 * 320 / np.prod(SMALL) / 1000


def organ(p, *names):
    return np.isin(p.mask, [ORGANS.index(n) for n in names])


def lungs(p):
    return organ(p, "right lung", "left lung", "emphysema")


def test_same_arguments_same_bits_and_other_seed_other_bits():
    a, b, c = (phantom(s, size=SMALL) for s in (5, 5, 6))
    assert np.array_equal(a.hu, b.hu) and np.array_equal(a.mask, b.mask)
    assert a.prompt == b.prompt and a.present == b.present
    assert not np.array_equal(a.hu, c.hu)


def test_shapes_types_and_field_of_view():
    p = phantom(3, size=(48, 40, 32))
    assert p.hu.shape == p.mask.shape == (48, 40, 32)
    assert p.hu.dtype == np.int16 and p.mask.dtype == np.uint8
    assert p.labels.shape == (18,) and p.labels.dtype == np.uint8 and len(LABELS) == 18
    spacing = np.array([352 / 48, 352 / 40, 320 / 32])
    assert np.allclose(np.diag(p.affine)[:3], spacing)
    # The middle of the grid is the scanner's origin.
    assert np.allclose(p.affine @ [23.5, 19.5, 15.5, 1], [0, 0, 0, 1])
    closer = phantom(3, size=(48, 40, 32), spacing=(3, 3, 4))
    assert np.allclose(np.diag(closer.affine)[:3], (3, 3, 4))


def test_findings_do_not_change_the_patient():
    healthy, sick = phantom(11, [], size=SMALL), phantom(11, ["lung nodule"], size=SMALL)
    changed = healthy.mask != sick.mask
    assert 0 < changed.mean() < 0.01
    assert abs(int((healthy.hu > -300).sum()) - int((sick.hu > -300).sum())) < 0.01 * healthy.hu.size


def test_time_of_a_phantom():
    phantom(0, size=(16, 16, 16))
    spent = []
    for seed in (1, 2):
        start = time.process_time()
        phantom(seed)
        spent.append(time.process_time() - start)
    assert min(spent) < 2.5  # s; the aim is 1 s on a free core


def test_a_coarse_grid_is_a_coarse_scan_of_the_same_patient():
    for seed in (0, 3):
        fine, coarse = phantom(seed), phantom(seed, size=SMALL)
        assert fine.prompt == coarse.prompt and fine.present == coarse.present
        averaged = fine.hu.reshape(64, 2, 64, 2, 32, 2).mean((1, 3, 5))
        assert np.corrcoef(averaged.ravel(), coarse.hu.ravel())[0, 1] > 0.99
        assert abs(averaged.mean() - coarse.hu.mean()) < 15  # HU


def test_orientation():
    """Larger x is the patient's right: liver there; stomach, spleen and the heart's apex on the left; table behind."""
    for seed in range(3):
        p = phantom(seed, [], size=SMALL)
        names = ("liver", "spleen", "stomach", "heart", "right lung", "table")
        centre = {name: np.argwhere(organ(p, name)).mean(0) for name in names}
        middle = np.argwhere(p.mask > 0).mean(0)[0]
        assert centre["liver"][0] > middle and centre["right lung"][0] > middle
        assert centre["spleen"][0] < middle and centre["stomach"][0] < middle and centre["heart"][0] < middle
        assert centre["table"][1] < centre["spleen"][1] < centre["heart"][1]
        assert centre["liver"][2] < centre["heart"][2]


WANTED_HU = {
    "background": (-1024, -970), "fat": (-125, -75), "muscle": (35, 65), "bone": (150, 700), "right lung": (-910, -760),
    "left lung": (-910, -760), "heart": (25, 170), "liver": (40, 130), "spleen": (35, 140), "aorta": (20, 330),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_hu_of_organs(seed):
    p = phantom(seed, [], size=SMALL)
    for name, (low, high) in WANTED_HU.items():
        inside = organ(p, name)
        assert inside.sum() > 20, name
        assert low <= np.median(p.hu[inside]) <= high, name


@pytest.mark.parametrize("side", ["right", "left"])
def test_effusion_grows_with_its_size_and_lies_on_its_side_behind(side):
    for seed in (0, 9):
        volumes = []
        for size in FINDINGS["pleural effusion"].sizes:
            p = phantom(seed, [{"name": "pleural effusion", "side": side, "size": size}], size=SMALL)
            fluid = organ(p, "pleural effusion")
            volumes.append(fluid.sum() * VOXEL_ML)
            where = np.argwhere(fluid)
            share_right = (where[:, 0] >= 32).mean()
            assert (share_right > 0.95) if side == "right" else (share_right < 0.05)
            assert where[:, 1].mean() < np.argwhere(lungs(p))[:, 1].mean()  # further back than the open lung
            assert -10 <= np.median(p.hu[fluid]) <= 30
        assert all(b > 1.3 * a for a, b in zip(volumes, volumes[1:], strict=False))
        assert volumes[-1] > 900


def heart_ratio(p):
    chest = lungs(p)
    heart = np.flatnonzero(organ(p, "heart").any((1, 2)))
    slices = [np.flatnonzero(chest[:, :, k].any(1)) for k in range(p.hu.shape[2]) if chest[:, :, k].any()]
    widest = max(np.ptp(x) + 1 for x in slices)
    return (np.ptp(heart) + 1) / widest


def test_heart_ratio():
    for seed in range(4):
        normal, large = phantom(seed, [], size=SMALL), phantom(seed, ["cardiomegaly"], size=SMALL)
        voxel = 1.5 / 48  # the measurement is good to a voxel at either edge of a chest of about 48
        assert heart_ratio(normal) < 0.48 + voxel
        assert heart_ratio(large) > 0.55 - voxel
        assert heart_ratio(large) > heart_ratio(normal) + 0.06


def test_pericardial_effusion_surrounds_the_heart():
    volumes = []
    for size in ("small", "moderate", "large"):
        p = phantom(4, [{"name": "pericardial effusion", "size": size}], size=SMALL)
        fluid = organ(p, "pericardial effusion")
        volumes.append(fluid.sum())
        assert -40 <= np.median(p.hu[fluid]) <= 35
    assert volumes[0] > 0 and volumes[0] < volumes[1] < volumes[2]
    assert not organ(phantom(4, [], size=SMALL), "pericardial effusion").any()


def test_emphysema_is_holes():
    for seed in range(3):
        healthy = phantom(seed, [], size=SMALL)
        shares = [(healthy.hu[lungs(healthy)] < -930).mean()]
        for size in ("mild", "moderate", "severe"):
            p = phantom(seed, [{"name": "emphysema", "size": size}], size=SMALL)
            shares.append((p.hu[lungs(p)] < -930).mean())
            rest = p.hu[organ(p, "right lung", "left lung")]
            assert abs(np.median(rest) - np.median(healthy.hu[lungs(healthy)])) < 60  # the lung between is not darker
        assert shares[0] < 0.005 and shares[1] > 0.02 and shares[1] < shares[2] < shares[3]


@pytest.mark.parametrize("millimetres", [14, 24])
def test_nodule_is_a_ball_of_its_size_in_its_lung(millimetres):
    for seed, side in ((1, "right"), (2, "left")):
        p = phantom(seed, [{"name": "lung nodule", "side": side, "size_mm": millimetres, "count": 1}])
        ball = organ(p, "lung nodule")
        measured = (ball.sum() * np.prod(np.diag(p.affine)[:3]) * 6 / np.pi) ** (1 / 3)
        assert abs(measured - millimetres) < 2.75
        extent = [np.ptp(axis) + 1 for axis in np.nonzero(ball)] * np.diag(p.affine)[:3]
        assert np.all(np.abs(extent - millimetres) < [5.5, 5.5, 10])
        assert (np.argwhere(ball)[:, 0].mean() > 64) == (side == "right")
        assert p.hu[ball].max() > -20 and p.hu[ball].mean() > -300  # solid; its rim shares voxels with lung


@pytest.mark.parametrize(
    ("finding", "least_hu"),
    [
        ({"name": "consolidation", "lobe": "lower"}, -100),
        ({"name": "atelectasis", "kind": "lobar"}, -50),
        ({"name": "atelectasis", "kind": "linear"}, -450),  # plates thinner than a voxel
    ],
)
def test_opaque_lung_is_opaque_and_on_its_side(finding, least_hu):
    for side in ("right", "left"):
        p = phantom(8, [{**finding, "side": side}])
        opaque = organ(p, finding["name"])
        assert opaque.sum() > 50
        assert np.median(p.hu[opaque]) > least_hu
        assert ((np.argwhere(opaque)[:, 0] >= 64).mean() > 0.9) == (side == "right")


def test_calcification_is_bright_on_a_coarse_grid():
    for seed in range(3):
        plaque = phantom(seed, [{"name": "arterial wall calcification", "size": "moderate"}], size=SMALL)
        inside = organ(plaque, "arterial wall calcification")
        assert (plaque.hu[inside] > 200).sum() >= 5 and plaque.hu[inside].max() > 350


def test_what_is_asked_for_is_drawn_and_nothing_else():
    for name in FINDINGS:
        p = phantom(2, [name], size=(16, 16, 16))
        assert [f.name for f in p.present] == [name]
        assert [LABELS[k] for k in np.flatnonzero(p.labels)] == [FINDINGS[name].label]
    assert not phantom(2, [], size=(16, 16, 16)).labels.any()
    f = Finding("lung nodule", side="left", lobe="upper", size_mm=22, count=1)
    assert phantom(2, [f], size=(16, 16, 16)).present[0].size_mm == 22
    both = phantom(2, ["atelectasis", {"name": "pleural effusion", "side": "left", "size": "large"}], size=(16, 16, 16))
    assert {(o.name, o.side) for o in both.present} == {("atelectasis", "left"), ("pleural effusion", "left")}


@pytest.mark.parametrize(
    ("findings", "error", "message"),
    [
        (["flu"], ValueError, "wanted names from .*pleural effusion.* got 'flu'"),
        ([{"name": "pleural effusion", "side": "up"}], ValueError, "side of pleural effusion: wanted .* got 'up'"),
        ([{"name": "pleural effusion", "size": "huge"}], ValueError, "pleural effusion: wanted .*'large'.*'huge'"),
        ([{"name": "cardiomegaly", "side": "left"}], ValueError, "side of cardiomegaly: wanted nothing, got 'left'"),
        ([{"name": "consolidation", "side": "left", "lobe": "middle"}], ValueError, "lobe of consolidation: wanted"),
        ([{"name": "lung nodule", "size_mm": 99}], ValueError, "size_mm of lung nodule: wanted 3 to 30 mm, got 99"),
        ([{"name": "atelectasis", "kind": "compressive"}], ValueError, "kind of atelectasis: wanted pleural effusion"),
        ([{"size": "large"}], ValueError, "wanted a dict with name"),
        ([3], TypeError, "wanted names, Findings or dicts, got int"),
        ("pleural effusion", TypeError, "wanted a list of findings, got str"),
        (5, TypeError, "wanted a list of findings, got int"),
        ([{"name": "cardiomegaly", "count": 5}], ValueError, "count of cardiomegaly: wanted nothing, got 5"),
        ([{"name": "lung nodule", "count": 2.5}], TypeError, "wanted an integer as count, got 2.5"),
        ([{"name": "lung nodule", "side": ["left"]}], TypeError, r"wanted a text as side, got \['left'\]"),
    ],
)
def test_findings_that_are_refused(findings, error, message):
    with pytest.raises(error, match=message):
        phantom(1, findings, size=(16, 16, 16))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed: wanted an integer >= 0, got -1"),
        ({"seed": 1.0}, TypeError, "seed: wanted an int, got float"),
        ({"seed": 1, "size": (8, 64, 64)}, ValueError, "size: wanted three numbers >= 16"),
        ({"seed": 1, "size": (64, 64)}, ValueError, "size: wanted three"),
        ({"seed": 1, "size": (16, 16, 16.5)}, ValueError, "size: wanted three integers"),
        ({"seed": 1, "spacing": (1.0, float("nan"), 1.0)}, ValueError, "spacing: wanted three numbers"),
        ({"seed": 1, "size": (16, 16, 16), "spacing": (0.1,) * 3}, ValueError, "of mm from 0.3 to 1000, got"),
        ({"seed": 1, "size": (16, 16, 16), "spacing": (1e9,) * 3}, ValueError, "of mm from 0.3 to 1000, got"),
        ({"seed": 1, "size": (2**15,) * 3, "spacing": (1, 1, 1)}, ValueError, "wanted at most 1073741824 voxels"),
        ({"seed": 1, "size": (10**400, 16, 16)}, ValueError, "size: wanted three numbers >= 16"),
    ],
)
def test_grids_and_seeds_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        phantom(**arguments)


def test_save_and_sheet(tmp_path):
    import nibabel as nib

    p = phantom(7, size=(32, 32, 16))
    paths = p.save(tmp_path / "out")
    assert all(path.stat().st_size > 0 for path in paths.values())
    assert np.array_equal(np.asarray(nib.load(paths["mask"]).dataobj), p.mask)
    assert np.array_equal(np.asarray(p.volume), p.hu) and p.volume.prompt == p.prompt
    made = contact_sheet([1, 2, 3], tmp_path / "sheet.png", size=(32, 32, 16))
    assert [q.seed for q in made] == [1, 2, 3] and (tmp_path / "sheet.png").stat().st_size > 0


def test_sheet_from_the_command_line(tmp_path, capsys):
    from t2ct.cli import main

    out = tmp_path / "sheet.png"
    words = ["phantom", "--sheet", str(out), "--size", "32", "32", "16", "--finding"]
    assert main([*words, "lung nodule:left:large", "--finding", "emphysema"]) == 0
    assert out.stat().st_size > 0 and f"wrote {out}" in capsys.readouterr().out
    for wrong, message in (
        ([*words[:2], "sheet.jpg"], "--sheet: wanted a file that ends in .png, got 'sheet.jpg'"),
        ([*words[:3], "--overwrite", "--normal"], "--sheet: wanted findings to draw, got --normal"),
        (words[:3], "wanted a new file"),
        (["phantom"], "-o, --output: wanted a folder"),
        (["phantom", "-o", str(tmp_path / "new")], "--seed: wanted an integer from 0, got nothing"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize(
    ("finding", "message"),
    [
        ({"name": "lymphadenopathy", "kind": "subcarinal", "side": "left"}, "side of lymphadenopathy: wanted nothing"),
        ({"name": "lymphadenopathy", "size_mm": 5}, "size_mm of lymphadenopathy: wanted 10 to 40 mm, got 5"),
        ({"name": "medical material", "kind": "sternal wires", "side": "left"}, "side of medical material: wanted"),
        ({"name": "medical material", "kind": "spoon"}, "kind of medical material: wanted .*got 'spoon'"),
        ({"name": "bronchiectasis", "side": "left", "lobe": "middle"}, "lobe of bronchiectasis: wanted"),
    ],
)
def test_new_findings_that_are_refused(finding, message):
    with pytest.raises(ValueError, match=message):
        phantom(1, [finding], size=(16, 16, 16))


def test_every_kind_of_every_finding_is_drawn():
    for name, disease in FINDINGS.items():
        for kind in disease.kinds:
            if kind != "compressive":
                p = phantom(3, [{"name": name, "kind": kind}], size=SMALL)
                assert p.present[0].kind == kind
                assert p.finding_mask(name).any(), (name, kind)


def test_a_finding_means_the_same_on_every_grid():
    """Share of the chest that a finding takes up, on a coarse grid and on one of half the voxels."""
    for name in ("lung opacity", "mosaic attenuation pattern", "hiatal hernia", "pulmonary fibrotic sequela"):
        shares = [phantom(4, [name], size=size).finding_mask(name).mean() for size in (SMALL, (128, 128, 64))]
        assert 0.6 < shares[0] / shares[1] < 1.6, name
