"""The whole VAE and UNet through the Triton kernels, forward and backward, against the plain networks."""

import pytest
import torch

from t2ct.models import VAE, UNet, UNetConfig, VAEConfig
from t2ct.ops import use_backend
from t2ct.ops.dispatch import why_not

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if why_not("triton", DEVICE, torch.float32):
    pytest.skip(why_not("triton", DEVICE, torch.float32), allow_module_level=True)


def filled(model):
    """Without branches that start as zeros, which would prove nothing."""
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model.to(DEVICE).eval()


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def vae_case():
    vae = filled(VAE(VAEConfig(channels=(4, 8), norm_groups=2, num_res_blocks=1)))
    x = torch.rand(1, 1, 4, 4, 6, device=DEVICE)
    return vae, lambda: vae.decode(vae.encode(x.to(next(vae.parameters()).dtype))[0])


def unet_case():
    config = UNetConfig((4, 8), (False, True), head_dim=8, cross_attention_dim=6, norm_groups=2, num_res_blocks=1)
    unet = filled(UNet(config))
    x, context = torch.randn(1, 4, 4, 2, 2, device=DEVICE), torch.randn(2, 1, 6, device=DEVICE)
    t, label, spacing = torch.ones(1, device=DEVICE), torch.ones(1, dtype=torch.long, device=DEVICE), torch.ones(1, 3)

    def run():
        dtype = next(unet.parameters()).dtype
        return unet(x.to(dtype), t, context.to(dtype), label, spacing.to(DEVICE, dtype))

    return unet, run


@pytest.mark.parametrize("case", (vae_case, unet_case))
def test_network(case):
    torch.manual_seed(0)
    model, run = case()
    parameters = [p for p in model.parameters() if p.requires_grad]
    results = []
    for backend in ("reference", "triton"):
        with use_backend(backend):
            y = run()
            gradients = torch.autograd.grad(y.square().sum(), parameters, allow_unused=True)
        results.append((y.detach(), gradients))
    (y, gradients), (mine, my_gradients) = results
    assert relative(mine, y) <= 1e-5
    largest = max(g.norm() for g in gradients if g is not None)
    for a, b in zip(my_gradients, gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6 * largest


@pytest.mark.parametrize("case", (vae_case, unet_case))
def test_network_in_half_precision(case):
    """At most twice the error of the eager network in float16."""
    torch.manual_seed(0)
    model, run = case()
    with torch.no_grad():
        with use_backend("reference"):
            exact = run()
            model.half()
            eager = run()
        with use_backend("triton"):
            mine = run()
    assert mine.dtype == torch.float16
    assert relative(mine, exact) <= 2 * relative(eager, exact) + 1e-3
