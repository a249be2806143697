"""Tensors of more than 2^31 numbers: every kernel at such a size, by the addresses that it computes."""

import pytest
import torch

pytest.importorskip("triton")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

if torch.cuda.is_available():
    pytest.skip("a GPU has tests of its own at such sizes, on real memory", allow_module_level=True)

from addresses import Wrong, addresses  # noqa: E402  needs triton
from t2ct.kernels import (  # noqa: E402
    attention,
    attention_backward,
    conv,
    conv_backward,
    norm,
    norm_backward,
    plan,
    resample,
)

HALF, SINGLE = torch.float16, torch.float32
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of numbers that wrap or are zero


def volume(*shape, dtype=HALF):
    """(N, C, D, H, W) without memory, channels-last."""
    return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last_3d)


def empty(*shape, dtype=HALF):
    return torch.empty(shape, dtype=dtype, device="meta")


DEEP, MANY = (1, 64, 132, 512, 512), (9, 64, 16, 512, 512)  # one large sample; samples that are large together
WIDE = (1, 64, 2, 8200, 4100)  # one plane has more than 2^31 numbers


def norms(shape, groups=32):
    x, c = volume(*shape), shape[1]
    n, w = shape[0], empty(c)
    mean, rstd = empty(n, groups, dtype=SINGLE), empty(n, groups, dtype=SINGLE)
    norm.partial_stats(x)
    norm.apply(x, mean, rstd, w, w, groups, True, x)
    norm_backward.group_norm_backward(x, x, w, w, mean, rstd, groups, True)


def statistics():
    """More statistics than 2^31: of so many tiles that they are folded first, and of so many samples."""
    for shape in ((2, 2**20 + 8, 1024), (2**20 + 8, 4, 1024)):
        mean, count = empty(*shape, dtype=SINGLE), empty(shape[1], dtype=SINGLE)
        norm._merge(mean, mean, count, 32, 1e-6)
    n, c = 2**19 + 8, 4096
    x, w, stat = volume(n, c, 1, 1, 1), empty(c), empty(n, 32, dtype=SINGLE)
    norm.partial_stats(x, 1)
    norm_backward.group_norm_backward(x, x, w, w, stat, stat, 32, True)
    norm_backward.from_sums(x, x, w, w, stat, stat, empty(n, 1, 2, c, dtype=SINGLE), 32)


def convolutions(shape, outputs, k=3):
    x, w = volume(*shape), empty(outputs, shape[1], k, k, k)
    padding = k // 2
    y = volume(shape[0], outputs, *shape[2:])
    stat = empty(shape[0], 8, dtype=SINGLE)
    gn_in, gn_out = (stat, stat, empty(shape[1]), empty(shape[1])), (stat, stat, empty(outputs), empty(outputs))
    conv.conv3d(x, w, empty(outputs), 1, padding, residual=y, channel_bias=empty(shape[0], outputs),
                norm=(*gn_in, 8), stats=True)  # fmt: skip
    turned = empty(shape[1], outputs, k, k, k)  # gradient with x as the gradient of something with `outputs` channels
    conv_backward.conv3d_backward_norm_silu(x, y, turned, padding, *gn_out, 8)
    conv_backward._weight_gradient(x, y, k, 1, (padding, padding))


def strided():
    x, w = volume(1, 16, 258, 1032, 1032), empty(16, 16, 3, 3, 3)
    conv.conv3d(x, w, None, 2, 1)
    y = volume(1, 16, 129, 516, 516)
    conv_backward.conv3d_backward(y, x, w, 2, 1)


def doubled(mode):
    x, w = volume(1, 32, 66, 260, 520), empty(32, 32, 3, 3, 3)
    conv.upsample_conv3d(x, w, None, mode)
    conv.upsample_conv3d(volume(1, 64, 132, 512, 512), empty(16, 64, 3, 3, 3), None, mode)
    y = volume(1, 32, 132, 520, 1040)
    conv_backward.upsample_conv3d_backward(y, x, w, mode)


def weights():
    """Weights of more than 2^31 numbers, alone and over eight phases, and partial sums of their gradient."""
    conv._conv(volume(1, 2048, 1, 1, 1), empty(1, 2**20 + 64, 1, 2048), (1, 1, 1), 1, 1, (0, 0))
    conv._conv(volume(1, 512, 1, 1, 1), empty(8, 2**17 + 64, 8, 512), (2, 2, 2), 2, 1, (1, 0))
    conv_backward._weight_gradient(volume(1, 64, 1, 1, 1), volume(1, 2**21, 1, 1, 1), 3)


def partials():
    """Statistics and sums of so many tiles that they are more than 2^31 numbers."""
    x, w = volume(1, 16, 4200, 4096, 4096), empty(16, 16, 1, 1, 1)
    stat, gn = empty(1, 8, dtype=SINGLE), empty(16)
    conv.conv3d(x, w, None, 1, 0, stats=True)
    conv_backward.conv3d_backward_norm_silu(x, x, w, 0, stat, stat, gn, gn, 8)


def resampled(shape):
    x = volume(*shape)
    half = volume(*shape[:2], *(m // 2 for m in shape[2:]))
    for mode in ("nearest", "trilinear"):
        resample.upsample(half, mode)
        resample.upsample_backward(x, mode)
    resample.average_pool(x)
    resample.average_pool_backward(half)


def attend(b, h, n, m, d=16, gap=0, bias=None, table=False, cosine=False, heads_first=False):
    """gap: numbers between the heads of a token and those of the next, as in a slice of a wide projection."""

    def tokens(count):
        if heads_first:
            return empty(b, h, count, d)
        wide = empty(b, count, h * d + gap)
        return wide[..., : h * d].unflatten(-1, (h, d)).transpose(1, 2)

    q, k, v = tokens(n), tokens(m), tokens(m)
    offsets = empty(h, (2 * (n // 32) - 1) * 63) if table else None
    scales = (empty(d),) * 2 if cosine else (None, None)
    options = (bias, offsets, *scales)
    attention.attention(q, k, v, *options, 0.25, False, 32)
    lse, needs = empty(b, h, n, dtype=SINGLE), [True] * 3 + [t is not None for t in options]
    attention_backward.attention_backward(q, q, k, v, *options, q, lse, 0.25, False, 32, needs)


def many_small_heads():
    """q, k, v, statistics of rows, partial sums of learned scales and parts of dk and dv, each beyond."""
    attend(2**23 + 8, 16, 16, 16, cosine=True)
    attend(2**18 + 8, 16, 3080, 16)
    attend(2**18 + 8, 8, 1032, 136)
    attend(1, 2**17, 1032, 136, heads_first=True)


def long_rows():
    attend(1, 1, 600, 600, gap=2**22)
    attend(1, 1, 600, 8, gap=2**22)
    attend(1, 2**16, 2100, 2100)  # what is written has rows as long as all heads


def biases():
    attend(1, 1, 700, 600, bias=empty(1, 1, 700, 2**22)[..., :600])
    attend(1, 1, 600, 700, bias=empty(1, 1, 700, 2**22)[..., :600].transpose(2, 3))
    for b, h, m in ((2**9, 2**9, 160), (1, 2**17, 160), (2**10, 2**11, 8), (1, 2**21, 8)):
        attend(b, h, 160, m, bias=empty(b, h, 160, m))
    attend(1, 2**17, 320, 320, table=True)


PROBES = {
    "norm, one sample": lambda: norms(DEEP), "norm, samples": lambda: norms(MANY),
    "norm, voxels": lambda: norms((1, 1, 129, 4096, 4096), 1), "statistics": statistics,
    "conv, one sample": lambda: convolutions(DEEP, 64), "conv, samples": lambda: convolutions(MANY, 64),
    "conv, few to many channels": lambda: convolutions((1, 8, 129, 512, 512), 64),
    "conv, a plane": lambda: convolutions(WIDE, 64), "conv, a plane, 1": lambda: convolutions(WIDE, 64, 1),
    "strided": strided, "nearest": lambda: doubled("nearest"), "trilinear": lambda: doubled("trilinear"),
    "weights": weights, "partial statistics": partials,
    "resampling, one sample": lambda: resampled((1, 64, 130, 512, 512)),
    "resampling, samples": lambda: resampled((9, 64, 16, 512, 512)), "resampling, a plane": lambda: resampled(WIDE),
    "attention, heads": many_small_heads, "attention, rows": long_rows, "attention, biases": biases,
}  # fmt: skip


@pytest.fixture(autouse=True)
def many_programs(monkeypatch):
    """Programs take as little as they can: what they do is the same, and a few of them run."""
    monkeypatch.setattr(plan, "FILL", 2**30)
    monkeypatch.setattr(attention_backward, "FILL", 2**30)
    monkeypatch.setattr(norm, "PROGRAMS", 2**30)


@pytest.mark.parametrize("probe", PROBES)
def test_addresses_lie_in_their_tensors(probe):
    with addresses() as seen:
        PROBES[probe]()
    beyond = {key: far for key, far in seen.reached.items() if far >= 2**31}
    assert beyond, f"nothing beyond 2^31: {seen.reached}"


@triton.jit
def copy_kernel(x, n, WIDE: tl.constexpr):
    """x[program * n] = 0"""
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(x + row * n, 0.0)


def test_an_offset_that_wraps_is_seen():
    x = empty(3, 2**30)
    with addresses() as seen:
        copy_kernel[(3,)](x, 2**30, WIDE=True)
        assert seen.reached == {("copy_kernel", "x"): 2**31}
        with pytest.raises(Wrong, match="copy_kernel: multiply of int32 gives up to 2,147,483,648"):
            copy_kernel[(3,)](x, 2**30, WIDE=False)
        with pytest.raises(Wrong, match=r"copy_kernel: x \(2, 4\), offsets 8 to 8"):
            copy_kernel[(3,)](empty(2, 4), 4, WIDE=True)
