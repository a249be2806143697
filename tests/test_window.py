"""The published windows, against MONAI's inferer, and how far they are from the network's own function."""

import pytest
import torch
from monai.inferers import SlidingWindowInferer

from t2ct.models import VAE, VAEConfig
from t2ct.models.window import decode_windows


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return VAE(VAEConfig(channels=(8, 16, 32), norm_groups=8, num_res_blocks=1)).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("size", "roi", "overlap"),
    [
        ((12, 10, 9), (6, 6, 6), 0.4),
        ((12, 10, 9), (8, 8, 8), 0.25),
        ((5, 12, 7), (5, 6, 6), 0.4),
        ((9, 9, 9), (7, 4, 9), 0.5),
    ],
)
def test_equals_the_published_inferer(vae, size, roi, overlap):
    z = torch.randn(1, 4, *size)
    want = SlidingWindowInferer(roi_size=roi, sw_batch_size=1, overlap=overlap, mode="gaussian")(z, vae.decode)
    got = decode_windows(vae.decode, z, 4, roi, overlap)
    assert (got - want).norm() <= 1e-5 * want.norm()


def test_windows_are_an_explicit_choice_and_not_the_network(vae, monkeypatch):
    z = torch.randn(2, 4, 12, 10, 9)
    monkeypatch.setattr(decode_windows, "__defaults__", ((6, 6, 6), 0.4))
    window, exact = vae.decode(z, method="window"), vae.decode(z)
    assert window.shape == exact.shape and (window - exact).norm() > 0.01 * exact.norm()
    assert vae.decode(z, method="window", hu=True).dtype == torch.int16
    with pytest.raises(ValueError, match="method must be"):
        vae.decode(z, method="tiles")


def test_one_window_is_the_whole_volume(vae):
    z = torch.randn(1, 4, 6, 5, 4)
    assert torch.allclose(vae.decode(z, method="window"), vae.decode(z), rtol=1e-5, atol=1e-6)
