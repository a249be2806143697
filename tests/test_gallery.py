"""The gallery: reports, what was generated, what they are of, and the nearest training volume, in one picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from t2ct.checks import EMBEDDED
from t2ct.eval.gallery import LINES, Shown, coarse, draw, gallery, main
from t2ct.eval.look import PIXELS

pytestmark = pytest.mark.skipif(not (EMBEDDED / "unet.safetensors").exists(), reason="no embedded model")


def test_a_gallery_is_drawn_and_says_what_is_near(tmp_path):
    path = tmp_path / "gallery.png"
    options = ["--data", "phantoms:3", "--known", "3", "--steps", "1", "--guidance", "1", "--device", "cpu"]
    (row,) = main([str(path), "--picks", "2", "--quiet", *options])
    made, real, near = row.volumes
    assert made.shape == real.shape == near.shape and row.nearest.startswith("phantom ")
    wanted = np.sqrt(np.mean((coarse(made).astype(float) - coarse(near)) ** 2))
    assert row.distance == pytest.approx(wanted) and row.unseen_distance > 0
    with Image.open(path) as picture:
        assert picture.width > 3 * picture.height and np.asarray(picture.convert("L")).std() > 20
    with pytest.raises(FileExistsError, match="gallery.png"):
        gallery(path, device="cpu", quiet=True)


def test_a_long_report_is_cut_and_a_row_is_as_high_as_its_text():
    hu = np.zeros((24, 24, 16), np.int16)
    short, long = (Shown(text, (hu, hu, hu), "a", 1.0, 2.0) for text in ("Normal.", "Effusion. " * 500))
    one, two = (draw([row], (14.7, 14.7, 20.0), "a and 2 more").height for row in (short, long))
    assert 0 < two - one < 20 * LINES
    assert draw([short, long], (14.7, 14.7, 20.0), "a").height < one + two


def test_coarse_takes_means():
    hu = np.random.default_rng(0).integers(-1000, 1000, (48, 48, 32)).astype(np.int16)
    means = hu.reshape(PIXELS[0], 2, PIXELS[1], 2, PIXELS[2], 2).mean((1, 3, 5))
    assert np.abs(coarse(hu) - means.ravel()).max() < 1e-3


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"path": "a.jpg"}, ValueError, "path: wanted a file named .png, got 'a.jpg'"),
        ({"picks": (3,)}, IndexError, r"picks: wanted reports from 0 to 2, got \[3\]"),
        ({"picks": ()}, IndexError, r"picks: wanted reports from 0 to 2, got \[\]"),
        ({"known": 0}, ValueError, "known: wanted at least 1 training volume, got 0"),
        ({"data": "nowhere"}, FileNotFoundError, "nowhere"),
        ({"model": "nowhere"}, FileNotFoundError, "nowhere"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_generated(tmp_path, monkeypatch, options, error, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "randn", None)  # no noise, nothing is generated
    with pytest.raises(error, match=told):
        given = {"path": "a.png", "data": "phantoms:3", "picks": (0,), "known": 2, "device": "cpu", "quiet": True}
        gallery(**given | options)
    assert not list(tmp_path.iterdir())
