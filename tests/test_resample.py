"""upsample and average_pool: values and gradients against float64, registration, errors."""

import pytest
import torch
import torch.nn.functional as F

from t2ct.ops import average_pool, resample, upsample, use_backend
from t2ct.ops.dispatch import why_not

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DEFINITIONS = {
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "trilinear": lambda x: F.interpolate(x, scale_factor=2.0, mode="trilinear"),
    "pool": lambda x: F.avg_pool3d(x, 2),
}
OPS = {"nearest": upsample, "trilinear": lambda x: upsample(x, "trilinear"), "pool": average_pool}
SHAPES = {"nearest": ((2, 5, 3, 2, 4), (1, 70, 1, 1, 1)), "pool": ((2, 5, 4, 2, 6), (1, 70, 2, 2, 2))}
SHAPES["trilinear"] = SHAPES["nearest"]


def make(shape, dtype):
    torch.manual_seed(0)
    return torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last_3d)


def error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend", ("triton", "reference"))
@pytest.mark.parametrize("mode", DEFINITIONS)
def test_matches_float64(mode, backend, dtype):
    if why_not(backend, DEVICE, dtype):
        pytest.skip(why_not(backend, DEVICE, dtype))
    for shape in SHAPES[mode]:
        x = make(shape, dtype).requires_grad_()
        with use_backend(backend):
            y = OPS[mode](x)
        exact_x = x.detach().double().requires_grad_()
        exact = DEFINITIONS[mode](exact_x)
        dy = make(exact.shape, dtype)
        (dx,) = torch.autograd.grad(y, x, dy)
        (exact_dx,) = torch.autograd.grad(exact, exact_x, dy.double())
        assert y.dtype == dx.dtype == dtype and y.shape == exact.shape
        assert error(y, exact) <= 4 * torch.finfo(dtype).eps and error(dx, exact_dx) <= 8 * torch.finfo(dtype).eps
        if backend == "triton":
            assert y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("mode", DEFINITIONS)
def test_many_small_tiles(mode, monkeypatch):
    """Several programs a plane and several blocks of channels, the last ones with voxels and channels that are not."""
    kernels = pytest.importorskip("t2ct.kernels.resample")
    monkeypatch.setattr(kernels, "tile", lambda name, c, plane: (8, 16))
    x = make((2, 20, 2, 6, 4) if mode == "pool" else (2, 20, 2, 5, 3), torch.float32).requires_grad_()
    with use_backend("triton"):
        y = OPS[mode](x)
        (dx,) = torch.autograd.grad(y, x, dy := make(y.shape, torch.float32))
    exact_x = x.detach().double().requires_grad_()
    exact = DEFINITIONS[mode](exact_x)
    (exact_dx,) = torch.autograd.grad(exact, exact_x, dy.double())
    assert error(y, exact) <= 1e-6 and error(dx, exact_dx) <= 1e-6


@pytest.mark.parametrize("mode", DEFINITIONS)
def test_registration(mode):
    if why_not("triton", DEVICE, torch.float32):
        pytest.skip(why_not("triton", DEVICE, torch.float32))
    x = make(SHAPES[mode][0], torch.float32)
    with use_backend("triton"), torch.no_grad():
        compiled = torch.compile(OPS[mode], fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(compiled, OPS[mode](x))
    torch.library.opcheck(resample._op, (make((1, 1, 2, 2, 2), torch.float32).requires_grad_(), mode, False))


def test_bad_input():
    x = make((1, 2, 3, 4, 4), torch.float32)
    with pytest.raises(ValueError, match=r"average_pool: the axes of x must be even, got \(3, 4, 4\)"):
        average_pool(x)
    with pytest.raises(ValueError, match='mode must be "nearest" or "trilinear", got'):
        upsample(x, "cubic")
    for bad in (x[0], x[:0], x.long()):
        with pytest.raises(ValueError, match="upsample: x must be non-empty, floating .* got"):
            upsample(bad)
    with use_backend("triton"), pytest.raises(RuntimeError, match="upsample: backend 'triton' cannot run: it reads"):
        upsample(x.contiguous())


# --------------------------------------------------------------------------------------------------- planes and out


LAYOUTS = {"contiguous": lambda x: x.contiguous(), "channels-last": lambda x: x,
           "with gaps": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]]}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend", (None, "triton", "reference"))
@pytest.mark.parametrize("mode", ("nearest", "trilinear"))
def test_planes_have_the_bits_of_the_whole(mode, backend, dtype, layout):
    reason = backend and why_not(backend, DEVICE, dtype, layout == "channels-last")
    if reason:
        pytest.skip(reason)
    for shape in ((2, 5, 4, 3, 2), (1, 33, 3, 1, 1), (1, 70, 1, 1, 1), (1, 1, 2, 1, 1)):
        x = LAYOUTS[layout](make(shape, dtype))
        x[:, :, -1, 0, 0] = float("nan")  # a plane of x that is not seen may hold anything
        with use_backend(backend), torch.no_grad():
            whole, size = upsample(x, mode), 2 * shape[2]
            some = [(a, b) for a in range(size) for b in range(a + 1, size + 1)]
            for start, stop in some if backend != "triton" else some[len(some) // 2 :: len(some)]:
                part = upsample(x, mode, (start, stop))
                assert torch.equal(part.nan_to_num(7), whole[:, :, start:stop].nan_to_num(7)), (shape, start, stop)
                room = make((shape[0], shape[1], size + 3, 2 * shape[3], 2 * shape[4]), dtype)
                out = room[:, :, 2 : 2 + stop - start] if shape[0] == 1 else torch.empty_like(part)
                if shape[0] > 1:
                    out = out.contiguous(memory_format=torch.channels_last_3d)
                before = room[:, :, :2].clone(), room[:, :, 2 + stop - start :].clone()
                assert upsample(x, mode, (start, stop), out=out) is out
                assert torch.equal(out.nan_to_num(7), part.nan_to_num(7)), (shape, start, stop)
                after = room[:, :, :2], room[:, :, 2 + stop - start :]
                assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("mode", ("nearest", "trilinear"))
def test_gradient_of_planes(mode):
    x = make((2, 3, 3, 2, 4), torch.float64).requires_grad_()
    for planes in ((0, 6), (0, 1), (3, 4), (1, 5), (5, 6)):
        dy = make((2, 3, planes[1] - planes[0], 4, 8), torch.float64)
        mine, exact = upsample(x, mode, planes), DEFINITIONS[mode](x)[:, :, planes[0] : planes[1]]
        (dx,), (exact_dx,) = torch.autograd.grad(mine, x, dy), torch.autograd.grad(exact, x, dy)
        assert error(dx, exact_dx) <= 1e-14


def test_bad_planes():
    x = make((1, 2, 3, 4, 5), torch.float32)
    for planes in ((0, 7), (-1, 2), (3, 3), (4, 2), (1,), 5, (0.0, 2), (None, 4)):
        with pytest.raises(ValueError, match=r"upsample: planes must be \(start, stop\), 0 <= start < stop <= 6, got "):
            upsample(x, "trilinear", planes)


def test_bad_out():
    x = make((1, 2, 3, 4, 5), torch.float32)
    good = make((1, 2, 6, 8, 10), torch.float32)
    room = make((1, 4, 6, 8, 20), torch.float32)
    bad = (good[:, :, :5], good.double(), good.to("meta"), good.contiguous(), room[:, :2, ..., :10], room[..., :10])
    for out in bad:
        with pytest.raises(ValueError, match=r"upsample: out must be torch.float32 \(1, 2, 6, 8, 10\) on .* got"):
            upsample(x, "trilinear", out=out)
    with pytest.raises(ValueError, match=r"upsample: out must be torch.float32 \(1, 2, 2, 8, 10\) on .* got"):
        upsample(x, "trilinear", (1, 3), out=good)
    def into(x):
        return upsample(x, "trilinear", out=torch.empty_like(good)) + 1

    with torch.no_grad():
        compiled = torch.compile(into, fullgraph=True, backend="aot_eager")(x)
    assert error(compiled, upsample(x.double(), "trilinear") + 1) <= 1e-6
    with pytest.raises(ValueError, match="out must come without a gradient, got"):
        upsample(x.clone().requires_grad_(), "trilinear", out=good)
    with pytest.raises(ValueError, match="out must be memory apart from x, got"):
        upsample(good[:, :, :, :4, :5][:, :, :3], "nearest", out=good)
