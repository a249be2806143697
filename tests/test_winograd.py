"""3x3x3 convolutions by Winograd's filtering (csrc/cpu/winograd): values, bits of parts, where it runs."""

import pytest
import torch
import torch.nn.functional as F
from memory import peak_bytes

from t2ct.ops import conv3d, conv_cpu, conv_gradient, group_norm_silu_conv3d, use_backend
from t2ct.ops.dispatch import EMULATED, native

LAST = torch.channels_last_3d
DTYPES = (torch.float32, torch.bfloat16)
# (N, C, X, Y, Z), outputs, pad: one voxel, blocks that are full and not, odd sizes, half a panel, chains of 64 channels
# that are full and not, two samples, no padding along X
CASES = (((1, 16, 1, 1, 1), 16, 1), ((2, 32, 5, 7, 9), 48, 1), ((1, 64, 3, 16, 40), 64, 1), ((1, 80, 6, 33, 35), 96, 0),
         ((3, 16, 4, 2, 3), 64, 1), ((1, 144, 3, 12, 6), 16, 1), ((1, 16, 20, 4, 4), 32, 1))  # fmt: skip


@pytest.fixture(autouse=True)
def compiled():
    if native() is None:
        pytest.skip("t2ct._C was not built")


def make(shape, outputs, dtype=torch.float32):
    torch.manual_seed(0)
    weight = torch.randn(outputs, shape[1], 3, 3, 3) / (27 * shape[1]) ** 0.5
    return torch.randn(shape).to(dtype).contiguous(memory_format=LAST), weight.to(dtype), torch.randn(outputs).to(dtype)


def error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape,outputs,pad", CASES, ids=str)
def test_matches_float64(isa, shape, outputs, pad, dtype):
    """As exact as torch's own, with everything that is added and without."""
    x, w, b = make(shape, outputs, dtype)
    plain = F.conv3d(x.double(), w.double(), padding=(pad, 1, 1))
    residual, shift = torch.randn(plain.shape).to(dtype), torch.randn(len(x), outputs).to(dtype)
    slack = 2e-7 if dtype == torch.float32 else 1e-5  # where torch adds up few numbers, the transforms round more
    for bias, channel_bias, added in ((None, None, None), (b, shift, residual)):
        exact = plain if bias is None else plain + (b + shift.double())[:, :, None, None, None] + residual
        theirs = F.conv3d(x, w, bias, padding=(pad, 1, 1))
        theirs = theirs if added is None else theirs + shift[:, :, None, None, None] + residual
        y = conv_cpu.winograd(x, w, bias, pad, added, channel_bias)
        assert y.dtype == dtype and y.is_contiguous(memory_format=LAST) and y.shape == exact.shape
        assert error(y, exact) <= 2 * error(theirs, exact) + slack
        assert dtype == torch.bfloat16 or error(y, exact) <= 3e-7  # whatever oneDNN has on this processor


def test_exact_where_numbers_are_whole(isa):
    """Small whole numbers, weights of quarters: no rounding anywhere, so every bit is known."""
    x, w, b = make((2, 32, 5, 9, 11), 16)
    x, w, b = (4 * x).round(), (16 * w).round() / 4, b.round()
    assert torch.equal(conv_cpu.winograd(x, w, b, 1), F.conv3d(x.double(), w.double(), b.double(), padding=1).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_slab_and_any_number_of_threads_have_the_bits_of_the_whole(isa, dtype):
    x, w, b = make((1, 32, 9, 18, 38), 32, dtype)
    whole, before = conv_cpu.winograd(x, w, b, 1), torch.get_num_threads()
    for start, stop in ((0, 3), (3, 8), (7, 9)):  # with the planes beside them, or zeros beyond the ends
        beside = F.pad(x, (0, 0, 0, 0, 1, 1))[:, :, start : stop + 2].contiguous(memory_format=LAST)
        assert torch.equal(conv_cpu.winograd(beside, w, b, 0), whole[:, :, start:stop])
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(conv_cpu.winograd(x, w, b, 1), whole)
    finally:
        torch.set_num_threads(before)


def test_what_it_takes_is_what_it_says():
    x, w, _ = make((1, 64, 6, 16, 16), 32)
    _, peak = peak_bytes(lambda: conv_cpu.winograd(x, w, None, 1))
    y, taps = 32 * 6 * 16 * 16 * 4, w.nbytes
    assert peak - y - taps <= conv_cpu.winograd_bytes(1, x.shape[2:], 64, 32, 1, torch.get_num_threads()) + 4096
    assert peak - y - taps >= 16 * 3 * 64 * 32 * 4


@pytest.mark.skipif(not conv_cpu.fast_voxels(), reason="preferred nowhere on this machine")
def test_where_it_runs(monkeypatch):
    ran = []
    monkeypatch.setattr(conv_cpu, "winograd", lambda *args, f=conv_cpu.winograd: ran.append(args[3]) or f(*args))
    x, w, b = make((1, 32, 8, 16, 16), 32)
    y = conv3d(x, w.requires_grad_(), b)
    assert not ran and y.requires_grad  # torch's, with its gradient
    w = w.detach()
    exact = F.conv3d(x.double(), w.double(), b.double(), padding=1)
    half = [t.bfloat16() for t in (x, w, b)]
    for run in (lambda: conv3d(x, w, b), lambda: conv3d(x, w, b, residual=x), lambda: conv3d(x, w, b, 1, (0, 1, 1))):
        run()
    assert ran == [1, 1, 0] and error(conv3d(x, w, b), exact) < 1e-6
    ran.clear()
    conv3d(*half)
    assert len(ran) == (torch.bfloat16 in EMULATED)  # elsewhere oneDNN multiplies bfloat16 as fast
    ran.clear()
    conv3d(x.contiguous(), w, b)  # another memory format
    conv3d(x, w, b, stride=2)
    conv3d(x, w, b, 1, (1, 0, 0))
    conv3d(x[:, :24].contiguous(memory_format=LAST), w[:, :24].contiguous(), b)  # channels not in sixteens
    conv3d(x[..., :3, :3].contiguous(memory_format=LAST), w, b)  # squares of which half stand over
    conv3d(x.double(), w.double(), b.double())
    with torch.autocast("cpu", torch.bfloat16):
        conv3d(x, w, b)
    with use_backend("reference"):
        conv3d(x, w, b)
    assert not ran


@pytest.mark.skipif(not conv_cpu.fast_voxels(), reason="preferred nowhere on this machine")
def test_the_gradient_of_x_is_one_too(monkeypatch):
    ran = []
    monkeypatch.setattr(conv_cpu, "winograd", lambda *args, f=conv_cpu.winograd: ran.append(1) or f(*args))
    x, w, b = make((2, 32, 6, 16, 16), 48)
    one, zero, dy = torch.ones(32), torch.zeros(32), torch.randn(2, 48, 6, 16, 16)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    y = group_norm_silu_conv3d(x, one, zero, w, b, 8)
    found = torch.autograd.grad(y, leaves, dy)
    assert len(ran) == 2  # the values, and their gradient
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    plain = F.conv3d(F.silu(F.group_norm(wide[0], 8, eps=1e-6)), wide[1], wide[2], padding=1)
    exact = torch.autograd.grad(plain, wide, dy.double())
    assert all(error(a, e) < 2e-6 for a, e in zip(found, exact, strict=True))
    dx, dw = conv_gradient.backward(dy, x.detach(), w.detach(), (True, False))
    assert dw is None and dx.shape == x.shape
    assert conv_gradient.backward(dy, x.detach(), w.detach(), (False, True))[0] is None


def test_a_nan_reaches_what_sees_it():
    x, w, _ = make((1, 16, 5, 12, 12), 16)
    x[0, 3, 2, 5, 5] = float("nan")
    spoilt = conv_cpu.winograd(x, w, None, 1).isnan().any(1)[0].nonzero()
    assert [spoilt[:, axis].unique().tolist() for axis in range(3)] == [[1, 2, 3], [4, 5, 6], [4, 5, 6]]


def test_the_default_dtype_is_not_the_kernels():
    x, w, _ = make((1, 32, 3, 8, 8), 32)
    channel_bias, want = torch.randn(1, 32), conv_cpu.winograd(x, w, None, 1)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(conv_cpu.winograd(x, w, None, 1), want)
            added = conv_cpu.winograd(x, w, None, 1, None, channel_bias) - want
        finally:
            torch.set_default_dtype(torch.float32)
        assert added.dtype == torch.float32 and (added - channel_bias[:, :, None, None, None]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="wanted planes for a result, got 2 with padding 0"):
        conv_cpu.winograd(x[:, :, :2], w, None, 0)


@pytest.mark.parametrize("threads", (1, 3, 16))
def test_what_it_takes_is_planned_for_any_number_of_threads(threads):
    """A tile of a plan is a result of its planes, whatever it reads."""
    for planes in (1, 4, 31, 32, 34, 128):
        asked = conv_cpu.winograd_bytes(1, (planes + 2, 16, 16), 256, 256, 0, threads)
        assert asked == conv_cpu.winograd_bytes(1, (planes, 16, 16), 256, 256, 1, threads)
        assert asked <= 4 * 16 * 256 * (3 * 256 + threads * 32 * 4) + threads * 2**20
