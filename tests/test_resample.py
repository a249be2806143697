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
