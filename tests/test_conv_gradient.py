"""The CPU's own ways to a convolution's gradient: against float64, where torch's own bfloat16 is wrong too."""

import pytest
import torch
import torch.nn.functional as F

from t2ct.ops import conv3d, conv_gradient, group_norm_silu_conv3d, use_backend
from t2ct.train.parts.critic import Critic

pytestmark = pytest.mark.usefixtures("one_thread")
LAST = torch.channels_last_3d


def truth(dy, x, weight):
    x, weight = (t.double().requires_grad_() for t in (x, weight))
    return torch.autograd.grad(F.conv3d(x, weight, padding=1), (x, weight), dy.double())


def error(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, LAST))
@pytest.mark.parametrize("size", ((2, 2, 1), (1, 3, 2), (4, 4, 4)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_few_voxels_by_matrix_products(dtype, size, memory_format):
    torch.manual_seed(0)
    n = 2 if size[2] == 1 else 1
    x = torch.randn(n, 192, *size).to(dtype, memory_format=memory_format)
    dy = torch.randn(n, 96, *size).to(dtype, memory_format=memory_format)
    weight = torch.randn(96, 192, 3, 3, 3) / 70
    assert conv_gradient.few(x, weight)
    exact = truth(dy, x, weight)
    made = conv_gradient.backward_few(dy, x, weight, (True, True))
    assert all(error(a, b) <= 2e-6 for a, b in zip(made, exact, strict=True))
    y = conv_gradient.forward_few(x, weight, torch.ones(96))
    assert error(y, F.conv3d(x.double(), weight.double(), torch.ones(96).double(), padding=1)) <= 2e-6
    assert made[1].dtype == torch.float32 and made[1].is_contiguous()
    assert conv_gradient.backward_few(dy, x, weight, (True, False))[1] is None
    assert conv_gradient.backward_few(dy, x, weight, (False, True))[0] is None


@pytest.mark.parametrize("size", ((6, 5, 8), (4, 16, 3), (2, 8, 9)))
def test_one_small_volume_in_two_halves(size):
    torch.manual_seed(0)
    x, dy = (torch.randn(1, c, *size).contiguous(memory_format=LAST) for c in (8, 12))
    weight = torch.randn(12, 8, 3, 3, 3) / 15
    assert conv_gradient._halves(x)
    for wanted in ((True, True), (False, True), (True, False)):
        made, exact = conv_gradient.backward(dy, x, weight, wanted), truth(dy, x, weight)
        for a, b, w in zip(made, exact, wanted, strict=True):
            assert (a is None) == (not w) and (a is None or error(a, b) <= 2e-6)


def test_what_is_left_to_torch():
    many, little = torch.randn(96, 192, 3, 3, 3), torch.randn(8, 8, 3, 3, 3)
    assert not conv_gradient.few(torch.randn(1, 192, 4, 4, 5), many)  # more voxels
    assert not conv_gradient.few(torch.randn(1, 8, 2, 2, 2), little)  # fewer weights
    assert not conv_gradient.few(torch.randn(1, 192, 2, 2, 2), many.to(memory_format=LAST))
    with use_backend("reference"):
        assert not conv_gradient.few(torch.randn(1, 192, 2, 2, 2), many)
    for x in (torch.randn(2, 8, 8, 8, 8), torch.randn(1, 8, 7, 8, 8), torch.randn(1, 8, 64, 64, 8),
              torch.randn(1, 8, 8, 8, 8).bfloat16()):  # fmt: skip
        assert not conv_gradient._halves(x)


@pytest.mark.parametrize("low", (False, True))
@pytest.mark.parametrize(("channels", "size"), ((128, (2, 2, 1)), (16, (8, 8, 4))))
def test_the_block_takes_these_ways(channels, size, low):
    """128 channels at 2 x 2 x 1 in bfloat16: torch's gradient of the input is nothing like it."""
    torch.manual_seed(0)
    shapes = ((1, channels, *size), (channels,), (channels,), (channels, channels, 3, 3, 3), (channels,))
    tensors = [torch.randn(s) * (0.02 if len(s) == 5 and s[2] == 3 else 1) for s in shapes]
    tensors[0] = tensors[0].contiguous(memory_format=LAST)
    dy = torch.randn(1, channels, *size)
    exact = [t.double().requires_grad_() for t in tensors]
    y = F.conv3d(F.silu(F.group_norm(exact[0], 8, exact[1], exact[2], 1e-6)), exact[3], exact[4], padding=1)
    wanted = torch.autograd.grad(y, exact, dy.double())
    ours = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        y = group_norm_silu_conv3d(*ours, 8)
    assert y.dtype == (torch.bfloat16 if low else torch.float32)
    made = torch.autograd.grad(y.float(), ours, dy)
    assert all(error(a, b) <= (3e-2 if low else 1e-5) for a, b in zip(made, wanted, strict=True))


@pytest.mark.parametrize(("kernel", "stride", "size"), ((3, 1, (2, 2, 2)), (3, 2, (2, 2, 1)), (3, 1, (4, 2, 6))))
def test_narrow_results_in_bfloat16(kernel, stride, size):
    """Where oneDNN's gradient of the weight is another number at every call."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 64, *size), (torch.randn(64, 64, *[kernel] * 3) / 40).requires_grad_()
    y = F.conv3d(x, weight, None, stride, 1)
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(y, weight, dy)[0].double()
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            y = conv3d(x.contiguous(memory_format=LAST), weight, None, stride)
        assert y.dtype == torch.bfloat16
        assert error(torch.autograd.grad(y, weight, dy.bfloat16())[0], wanted) < 2e-2
        if stride == 1:
            made = conv_gradient.backward(*(t.bfloat16() for t in (dy, x, weight.detach())), (False, True))
            assert error(made[1], wanted) < 2e-2


def test_the_critic_in_bfloat16_over_a_small_patch():
    torch.manual_seed(0)
    critic, x = Critic(8, 3), torch.rand(1, 1, 32, 32, 32)
    exact = torch.autograd.grad(critic(x).square().mean(), critic.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        y = critic(x)
    made = torch.autograd.grad(y.float().square().mean(), critic.parameters())
    assert all(error(a, b.double()) < 0.3 for a, b in zip(made, exact, strict=True))
