"""The Triton convolutions, on a GPU or in the interpreter: every form, its gradients, tiling and fusion."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from t2ct.ops import conv3d, conv_autograd, dispatch, upsample_conv3d, use_backend

pytest.importorskip("triton")

from t2ct.kernels import conv, conv_backward, fold, plan  # noqa: E402  needs triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}
# (N, C, X, Y, Z), outputs, kernel, stride, padding: channels beside every block size, odd sizes, one voxel, two samples
FORMS = (
    ((2, 5, 5, 6, 3), 7, 3, 1, 1),
    ((1, 40, 3, 3, 2), 24, 3, 1, 1),
    ((1, 3, 1, 1, 1), 1, 3, 1, 1),
    ((1, 4, 4, 3, 3), 3, 3, 1, 0),
    ((2, 8, 4, 3, 2), 12, 1, 1, 0),
    ((1, 8, 7, 6, 5), 8, 3, 2, 0),
    ((1, 6, 6, 6, 5), 8, 3, 2, 1),
)
ids = {"ids": lambda v: str(v).removeprefix("torch.")}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, **ids)


def make(shape, outputs, k, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    w = torch.randn(outputs, shape[1], k, k, k, device=DEVICE) / (shape[1] * k**3) ** 0.5
    return x, w.to(dtype), torch.randn(outputs, device=DEVICE).to(dtype)


def error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


def run(fn, tensors, dy=None):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = fn(*leaves)
    dy = torch.randn(y.shape, device=y.device, generator=torch.Generator(y.device).manual_seed(1)) if dy is None else dy
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))], dy.to(tensors[0].dtype)


def compare(op, definition, tensors, slack=4):
    """Values and gradients of op under Triton within twice the eager error in the same dtype, both against float64."""
    dtype = tensors[0].dtype
    with use_backend("triton"):
        mine, dy = run(op, tensors)
    exact, _ = run(definition, [t.double() for t in tensors], dy)
    eager, _ = run(definition, tensors, dy)
    for ours, theirs, truth in zip(mine, eager, exact, strict=True):
        assert ours.dtype == dtype
        assert error(ours, truth) <= 2 * error(theirs, truth) + slack * EPS[dtype]


@each_dtype
@pytest.mark.parametrize("shape,outputs,k,stride,padding", FORMS, **ids)
def test_convolution(shape, outputs, k, stride, padding, dtype):
    def op(f):
        return lambda x, w, b: f(x, w, b, stride=stride, padding=padding)

    compare(op(conv3d), op(F.conv3d), make(shape, outputs, k, dtype))


@each_dtype
@pytest.mark.parametrize("mode", ("nearest", "trilinear"))
@pytest.mark.parametrize("size", ((3, 4, 2), (1, 2, 5), (1, 1, 1)), **ids)
def test_folded_upsampling(mode, size, dtype):
    def definition(x, w, b):
        return F.conv3d(F.interpolate(x, scale_factor=2.0, mode=mode), w, b, padding=1)

    # folded weights are rounded once more than the definition's
    compare(lambda x, w, b: upsample_conv3d(x, w, b, mode), definition, make((1, 5, *size), 6, 3, dtype), slack=8)


@pytest.fixture(params=(False, True), ids=("pointers", "descriptors"))
def small_tiles(request, monkeypatch):
    """Blocks so small that every loop turns and every edge is met; with tensor descriptors too."""

    def small(device, dtype, c, o, gradient=False, **_):
        return plan.Launch(16, 16, 16, 4, 2, tma=request.param and not gradient)

    for module in (conv, conv_backward):
        monkeypatch.setattr(module, "launch", small)
    monkeypatch.setattr(plan, "FILL", 60)
    if request.param and DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors want compute capability 9.0")


def test_many_small_tiles(small_tiles):
    """Forward with 27 taps; gradients with one, whose loops are the same."""
    x, w, b = make((2, 20, 3, 2, 3), 20, 3, torch.float16)
    y, exact = conv.conv3d(x, w, b), F.conv3d(x.double(), w.double(), b.double(), padding=1)
    assert error(y, exact) <= 2e-3
    x, w, b = make((2, 20, 4, 3, 5), 24, 1, torch.float16)
    compare(lambda *t: conv3d(*t, padding=0), F.conv3d, (x, w, b))


@each_dtype
def test_fused_input_and_output(small_tiles, dtype):
    """GroupNorm with SiLU on the way in, zeros after them; sums and statistics on the way out."""
    x, w, b = make((2, 8, 5, 3, 2), 12, 3, dtype)
    mean, rstd = torch.randn(2, 4, device=DEVICE), torch.rand(2, 4, device=DEVICE) + 0.5
    gamma, beta = torch.randn(2, 2 * 8, device=DEVICE)[:, ::2].to(dtype)
    norm = (mean, rstd, gamma, beta, 4)
    scale = rstd.double().repeat_interleave(2, 1) * gamma.double()
    shift = beta.double() - mean.double().repeat_interleave(2, 1) * scale
    channel_bias = torch.randn(2, 12, device=DEVICE).to(dtype)
    residual = torch.randn(2, 12, 5, 3, 2, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    y, (mean, m2, count) = conv.conv3d(
        x, w, b, norm=norm, channel_bias=channel_bias, residual=residual, stats=True
    )

    def wide(t):
        return t.double()[:, :, None, None, None]

    for silu in (True, False):
        a = x.double() * wide(scale) + wide(shift)
        exact = F.conv3d(F.silu(a) if silu else a, w.double(), b.double(), padding=1)
        if silu:
            assert error(y, exact + wide(channel_bias) + residual.double()) <= 4 * EPS[dtype]
        else:
            assert error(conv.conv3d(x, w, b, norm=norm, silu=False), exact) <= 4 * EPS[dtype]
    assert count.sum() == 30 and len(count) > 1
    weight = count.double()[None, :, None]
    merged = (mean.double() * weight).sum(1) / 30
    total = (m2.double() + weight * (mean.double() - merged[:, None]) ** 2).sum(1)
    flat = y.double().flatten(2)
    tolerance = 1e-6 if DEVICE == "cuda" or dtype != torch.bfloat16 else 1e-2  # interpreted, y is rounded afterwards
    assert error(merged, flat.mean(2)) <= tolerance
    assert error(total / 30, flat.var(2, correction=0)) <= tolerance


@each_dtype
def test_gradient_behind_a_norm(small_tiles, dtype):
    """The gradient of silu(norm(x)) times SiLU's slope, and its sums with 1 and with xhat, per tile."""
    x, w, _ = make((2, 12, 5, 3, 2), 8, 3, dtype)
    dy = torch.randn(2, 8, 5, 3, 2, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    mean, rstd = torch.randn(2, 4, device=DEVICE), torch.rand(2, 4, device=DEVICE) + 0.5
    gamma, beta = torch.randn(2, 12, device=DEVICE).to(dtype)
    dz, sums = conv_backward.conv3d_backward_norm_silu(dy, x, w, 1, mean, rstd, gamma, beta, 4)

    def wide(t):
        return t.double()[..., None, None, None]

    xhat = (x.double() - wide(mean.repeat_interleave(3, 1))) * wide(rstd.repeat_interleave(3, 1))
    z = (xhat * wide(gamma) + wide(beta)).requires_grad_()
    (exact,) = torch.autograd.grad(F.conv3d(F.silu(z), w.double(), padding=1), z, dy.double())
    assert dz.dtype == dtype and error(dz, exact) <= 4 * EPS[dtype]
    assert sums.shape[1] > 1 and sums.dtype == torch.float32
    for mine, truth in zip(sums.sum(1).unbind(1), (exact, exact * xhat), strict=True):
        assert error(mine, truth.sum((2, 3, 4))) <= 1e-5  # of numbers that are not rounded yet


@each_dtype
def test_residual_and_channel_bias(dtype):
    x, w, b = make((2, 6, 3, 2, 2), 10, 3, dtype)
    residual, channel_bias = torch.randn(2, 10, 3, 2, 2, device=DEVICE), torch.randn(2, 10, device=DEVICE)

    def definition(x, w, b, r, c):
        return F.conv3d(x, w, b, padding=1) + r + c[:, :, None, None, None]

    def op(x, w, b, r, c):
        return conv3d(x, w, b, residual=r, channel_bias=c)

    tensors = (x, w, b, residual.to(dtype), channel_bias.to(dtype))
    compare(op, definition, tensors)
    with use_backend("reference"):
        assert error(op(*tensors), definition(*(t.double() for t in tensors))) <= 4 * EPS[dtype]
    with use_backend("triton"):  # a channel bias and a bias with gaps between their numbers
        gaps = [t.repeat_interleave(2, -1)[..., ::2] for t in (b, tensors[4])]
        assert torch.equal(op(x, w, gaps[0], tensors[3], gaps[1]), op(*tensors))


def test_same_bits_twice():
    x, w, b = make((1, 12, 4, 5, 3), 9, 3, torch.float16)
    with use_backend("triton"):
        (first, _), (second, _) = run(conv3d, (x, w, b)), run(conv3d, (x, w, b))
    assert all(torch.equal(a, c) for a, c in zip(first, second, strict=True))


def test_registration():
    x, w, b = (t.requires_grad_() for t in make((1, 2, 2, 1, 1), 3, 1, torch.float32))
    residual = torch.randn(1, 3, 2, 1, 1, device=DEVICE).contiguous(memory_format=torch.channels_last_3d)
    with use_backend("triton"):
        torch.library.opcheck(conv_autograd._op, (x, w, b, residual, torch.randn(1, 3, device=DEVICE), 1, 0))
        x, w, b = (t.requires_grad_() for t in make((1, 1, 1, 1, 1), 1, 3, torch.float32))
        torch.library.opcheck(conv_autograd._upsample_op, (x, w, b, "nearest"))


def test_compiled_whole():
    x, w, b = make((1, 4, 3, 3, 2), 4, 3, torch.float32)

    def two(x, w, b):
        return upsample_conv3d(conv3d(x, w, b), w, b)

    with use_backend("triton"), torch.no_grad():
        y = torch.compile(two, fullgraph=True, backend="aot_eager")(x, w, b)
        assert torch.equal(y, two(x, w, b))


@pytest.mark.parametrize("matrix", (fold.NEAREST, fold.TRILINEAR, fold.NEAREST_GRADIENT, fold.stride_gradient(0)))
def test_unfolding_is_the_adjoint(matrix):
    w = torch.randn(3, 2, 3, 3, 3, dtype=torch.float64)
    folded = fold.fold(w, matrix)
    g = torch.randn_like(folded)
    assert abs((folded * g).sum() - (w * fold.unfold(g, matrix)).sum()) <= 1e-12


def test_boxes_and_launches():
    assert plan.box((64, 64, 64), 128) == (4, 4, 8) and plan.box((1, 1, 1), 16) == (16, 1, 1)
    assert plan.box((2, 100, 3), 64)[0] == 2 and plan.box((64, 64, 64), 128, 2) == (2, 8, 8)
    for arch in (80, 90, 100):
        for c, o in ((1, 64), (4, 4), (64, 1), (512, 1024)):
            for at in (plan.launch(arch, torch.float16, c, o), plan.launch(arch, torch.float32, c, o, gradient=True)):
                assert all(n & (n - 1) == 0 and n >= 16 for n in (at.bm, at.bn, at.bk))
    assert plan.splits_of(10_000, 50) == 1 and plan.splits_of(27, 1000) == 20 and plan.splits_of(1, 3) == 3


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_numbers():
    x = torch.randn(1, 64, 128, 512, 520, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last_3d)
    w = torch.randn(16, 64, 3, 3, 3, device="cuda", dtype=torch.float16) / 40
    y = conv.conv3d(x, w)
    exact = F.conv3d(x[:, :, -3:, -3:, -3:].double(), w.double(), padding=1)
    assert error(y[:, :, -2:, -2:, -2:], exact[:, :, -2:, -2:, -2:]) <= 2e-3


def test_a_forced_form_that_cannot_run_raises():
    x, w, b = make((1, 4, 6, 6, 6), 4, 3, torch.float32)
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match="conv3d: backend 'triton' cannot run: it reads channels_last"):
            conv3d(x.contiguous(), w, b)
        with pytest.raises(RuntimeError, match=r"it has 3x3x3 of .*, not \(3, 3, 3\) of stride 3"):
            conv3d(x, w, b, stride=3)
        with pytest.raises(RuntimeError, match="it takes float16, bfloat16 and float32, not float64"):
            upsample_conv3d(x.double(), w.double(), b.double())
    with pytest.raises(ValueError, match='mode must be "nearest" or "trilinear", got'):
        upsample_conv3d(x, w, b, mode="cubic")
    with pytest.raises(ValueError, match=r"residual must be \(1, 4, 6, 6, 6\), got \(1, 4, 6, 6, 3\)"):
        conv3d(x, w, b, residual=x[..., :3])
    with pytest.raises(ValueError, match=r"channel_bias must be \(1, 4\), got \(4,\)"):
        conv3d(x, w, b, channel_bias=b)


def test_not_preferred_until_measured():
    x = make((1, 4, 2, 2, 2), 4, 3, torch.float32)[0]
    assert "has not been measured" in dispatch.refusal("triton", x)
    with use_backend("triton"):
        assert dispatch.refusal("triton", x) is None


def test_descriptors_want_rows_of_sixteen_bytes():
    at = replace(plan.launch(90, torch.float16, 4, 16), tma=True)
    x, w, _ = make((1, 4, 2, 2, 2), 16, 3, torch.float16)
    assert conv._descriptors(x, fold.taps_last(w), at, (4, 4, 8)) is None


def test_descriptors_of_axes_of_one_voxel():
    """Such an axis may have any stride, and TMA refuses those that are not multiples of 16 bytes."""
    at = replace(plan.launch(torch.device("cpu"), torch.float16, 64, 64), tma=True)
    slices = torch.randn(1, 64, 4, 4).contiguous(memory_format=torch.channels_last)
    for x in (torch.randn(2, 64, 1, 1, 1).half(), slices.half()[..., None]):
        weight = fold.taps_last(torch.randn(64, 64, 3, 3, 3).half())
        found = conv._descriptors(x, weight, at, (1, 1, 1))
        assert found is not None and list(found[0].shape) == [x.shape[0], *x.shape[2:], 64]
        read = torch.as_strided(x, found[0].shape, found[0].strides)
        assert torch.equal(read, x.permute(0, 2, 3, 4, 1))


def test_folding_matrices_stay_on_a_gpu():
    with torch.inference_mode():
        kept = fold._kept(fold.NEAREST, torch.float32, torch.device("cpu"))
    assert fold._kept(fold.NEAREST, torch.float32, torch.device("cpu")) is kept and not kept.is_inference()
    assert fold._matrix(fold.NEAREST, torch.float32, torch.empty(1)) is not kept  # on a CPU nothing waits


def test_tuning_has_candidates_for_every_width(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    tune = importlib.import_module("tune")
    monkeypatch.setattr(plan, "architecture", lambda device: 90)
    for _, width, _ in tune.WIDTHS:
        found = list(tune.candidates(width))
        assert found and len(found) == len(set(found))
        assert all(at.bk <= width and at.bn <= width for at in found)
