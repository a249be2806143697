"""The operators of gradients, registered for themselves, and whole blocks compiled with the Triton kernels in them."""

import pytest
import torch

from t2ct.models.unet import UNetConfig
from t2ct.models.unet_blocks import ResBlock, SpatialTransformer
from t2ct.models.vae import ResBlock as VAEResBlock
from t2ct.ops import conv_autograd, norm, resample, use_backend
from t2ct.ops.attention import _op as attend
from t2ct.ops.attention import _op_backward as attend_backward
from t2ct.ops.dispatch import why_not

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = why_not("triton", DEVICE, torch.float32)
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON or "")


@pytest.fixture(autouse=True)
def triton_backend():
    torch.manual_seed(0)
    torch.compiler.reset()
    with use_backend("triton"):
        yield


def volume(*shape):
    return torch.randn(shape, device=DEVICE).contiguous(memory_format=torch.channels_last_3d)


def check(op, *arguments):
    """Schema, fake tensors and dispatch of an operator that needs no gradient of its own."""
    torch.library.opcheck(op, arguments)


def test_norm_backward():
    x, c = volume(2, 4, 2, 1, 3), torch.randn(3, 4, device=DEVICE)
    stats = torch.rand(2, 2, 2, device=DEVICE) + 0.5
    for silu in (True, False):
        check(norm._backward, volume(2, 4, 2, 1, 3), x, c[0], c[1], stats[0], stats[1], 2, silu)


def test_conv_backward():
    x, w = volume(1, 3, 2, 2, 3), torch.randn(5, 3, 3, 3, 3, device=DEVICE)
    check(conv_autograd._op_backward, volume(1, 5, 2, 2, 3), x, w, 1, 1, "")
    check(conv_autograd._op_backward, volume(1, 5, 1, 1, 2), x, w, 2, 1, "")
    check(conv_autograd._op_backward, volume(1, 5, 2, 2, 3), x, w[..., 1:2, 1:2, 1:2].contiguous(), 1, 0, "")
    for mode in ("nearest", "trilinear"):
        check(conv_autograd._op_backward, volume(1, 5, 2, 2, 2), volume(1, 3, 1, 1, 1), w, 1, 1, mode)


def test_resample_backward():
    for mode in ("nearest", "trilinear", "pool"):
        check(resample._op, volume(1, 3, 2, 4, 2), mode, True)


@pytest.mark.parametrize("form", ("plain", "bias", "relative, cosine"))
def test_attention_backward(form):
    q, k, v, do = (torch.randn(1, 2, 4, 16, device=DEVICE) for _ in range(4))
    bias = torch.randn(1, 2, 4, 4, device=DEVICE) if form == "bias" else None
    table = torch.randn(2, 9, device=DEVICE) if "relative" in form else None
    scales = (torch.rand(16, device=DEVICE), torch.rand(16, device=DEVICE)) if "cosine" in form else (None, None)
    out, lse = attend(q, k, v, bias, table, *scales, 0.25, False, 2)
    for needs in ([True] * 3 + [t is not None for t in (bias, table, *scales)], [True] + [False] * 6):
        check(attend_backward, do, q, k, v, bias, table, *scales, out, lse, 0.25, False, 2, needs)


def filled(module):
    """Without branches that start as zeros, which would prove nothing."""
    for p in module.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return module.to(DEVICE)


CONFIG = UNetConfig((16,), (True,), head_dim=16, cross_attention_dim=6, norm_groups=2)


def vae_block():
    return VAEResBlock(8, 8, 2, 1e-6), (volume(1, 8, 3, 2, 2),)


def unet_block():
    return ResBlock(CONFIG, 8, 16, 6), (volume(1, 8, 3, 2, 2), torch.randn(1, 6, device=DEVICE))


def attention_block():
    return SpatialTransformer(CONFIG, 16), (volume(1, 16, 3, 2, 2), torch.randn(1, 3, 6, device=DEVICE))


def run(call, module, inputs):
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    y = call(*inputs)
    dy = torch.randn(y.shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
    return [y.detach(), *torch.autograd.grad(y, [*inputs, *module.parameters()], dy)]


@pytest.mark.parametrize("make", (vae_block, unet_block, attention_block))
def test_block_compiled_whole(make):
    """One graph, forward and gradient; the values are those of the same kernels called directly, and of float64."""
    module, inputs = make()
    module = filled(module)
    direct = run(module, module, inputs)
    compiled = run(torch.compile(module, fullgraph=True, backend="aot_eager"), module, inputs)
    with use_backend("reference"):
        exact = run(module.double(), module, [t.double() for t in inputs])
    largest = max(t.norm() for t in exact)
    for mine, same, truth in zip(compiled, direct, exact, strict=True):
        assert mine.shape == same.shape and mine.dtype == torch.float32
        assert (mine - same).norm() <= 1e-5 * same.norm() + 1e-7 * largest
        assert (mine.double() - truth).norm() <= 1e-5 * truth.norm() + 1e-7 * largest
