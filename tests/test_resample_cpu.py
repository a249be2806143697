"""Trilinear doubling by csrc: values and gradients against float64, the same bits however it is asked for, what it
refuses."""

import pytest
import torch
import torch.nn.functional as F

from t2ct.ops import conv3d, explain_rows, resample_cpu, upsample, upsample_conv3d, use_backend
from t2ct.ops.dispatch import native, why_not

LAST = torch.channels_last_3d
# Odd sizes, axes of one voxel, a batch; channels that fill vectors, that do not, fewer than one, more than a piece.
SHAPES = ((1, 64, 5, 4, 3), (2, 37, 3, 2, 5), (1, 1, 1, 1, 1), (2, 3, 1, 7, 1), (1, 48, 2, 1, 70), (1, 8, 11, 9, 19),
          (1, 1100, 2, 3, 2), (3, 16, 1, 1, 1))
dtypes = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d).removeprefix("torch."))
by_cpu = pytest.mark.skipif(native() is None, reason=str(why_not("cpu", "cpu", torch.float32)))


def definition(x):
    return F.interpolate(x, scale_factor=2.0, mode="trilinear")


def make(shape, dtype):
    return torch.randn(shape).to(dtype).contiguous(memory_format=LAST)


def error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


def gradient(fn, x, dy):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(fn(x), x, dy)[0]


def double(x, *planes, out=None):
    return upsample(x, "trilinear", planes or None, out=out)


@dtypes
def test_matches_float64(isa, dtype):
    for shape in SHAPES:
        x, dy = make(shape, dtype), make((*shape[:2], *(2 * m for m in shape[2:])), dtype)
        y, dx = double(x), gradient(double, x, dy)
        assert y.dtype == dx.dtype == dtype and y.shape == dy.shape and dx.shape == x.shape
        assert y.is_contiguous(memory_format=LAST) and dx.is_contiguous(memory_format=LAST)
        exact, exact_dx = definition(x.double()), gradient(definition, x.double(), dy.double())
        one = torch.finfo(torch.float32).eps
        assert error(y, exact) <= 2 * error(definition(x), exact) + one, shape
        assert error(dx, exact_dx) <= 2 * error(gradient(definition, x, dy), exact_dx) + one, shape
        strided = dy.contiguous()  # a gradient arrives in whatever layout it has
        assert torch.equal(gradient(double, x, strided), dx)


@dtypes
def test_planes_have_the_bits_of_the_whole(isa, dtype):
    """Of x as a view into a larger volume too, into memory that is there, which is written nowhere else."""
    for shape in SHAPES[:7]:
        x, size = make(shape, dtype), 2 * shape[2]
        whole = double(x)
        if shape[0] == 1:
            wide = make((1, shape[1], shape[2] + 3, *shape[3:]), dtype)
            wide[:, :, 2 : 2 + shape[2]] = x
            x = wide[:, :, 2 : 2 + shape[2]]
        some = [(a, b) for a in range(size) for b in range(a + 1, size + 1)]
        for start, stop in some[:: 1 + len(some) // 30]:
            assert torch.equal(double(x, start, stop), whole[:, :, start:stop]), (shape, start, stop)
            room = make((1, shape[1], size + 2, 2 * shape[3], 2 * shape[4]), dtype)
            if shape[0] > 1:
                continue
            kept = room.clone()
            double(x, start, stop, out=room[:, :, 1 : 1 + stop - start])
            kept[:, :, 1 : 1 + stop - start] = whole[:, :, start:stop]
            assert torch.equal(room, kept), (shape, start, stop)


@dtypes
def test_same_bits_past_the_cache_and_at_any_address(isa, dtype):
    """What is larger than a cache is stored past it where its address allows."""
    for c in (32, 48):
        x = make((1, c, 16, 32, 64), dtype)
        whole = double(x)
        assert whole.nbytes >= 16 << 20 and whole.data_ptr() % 64 == 0
        assert torch.equal(torch.cat([double(x, i, i + 4) for i in range(0, 32, 4)], 2), whole)
        assert torch.equal(double(x, out=torch.full_like(whole, 7)), whole)
        odd = torch.empty(whole.numel() + 3, dtype=dtype)[3:].view(1, 32, 64, 128, c).permute(0, 4, 1, 2, 3)
        assert torch.equal(double(x, out=odd), whole)
        assert error(whole, definition(x.double())) <= torch.finfo(dtype).eps


@dtypes
def test_same_bits_on_any_number_of_threads(isa, dtype):
    x, dy = make((2, 24, 9, 17, 12), dtype), make((2, 24, 18, 34, 24), dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append((double(x), double(x, 3, 12), gradient(double, x, dy)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@dtypes
def test_extremes(isa, dtype):
    """Constants stay what they are to the last bit, the largest and the smallest too; NaN and infinity spread to what
    they go into and no further."""
    for value in (torch.finfo(dtype).max, torch.finfo(dtype).tiny, 0.1, -3e38, 0.0):
        x = torch.full((1, 40, 2, 3, 4), value, dtype=dtype).contiguous(memory_format=LAST)
        assert torch.equal(double(x), x.repeat(1, 1, 2, 2, 2))
    for bits in (0x7FC0, 0x7F81, -1, 0x7F80):  # quiet, signalling, with every bit set; infinity
        x = torch.zeros(1, 40, 5, 5, 5, dtype=torch.bfloat16)
        x[:, :, 2, 2, 2] = torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16)
        x = x.to(dtype).contiguous(memory_format=LAST)
        y = double(x)
        seen = torch.zeros(y.shape, dtype=torch.bool)
        seen[:, :, 3:7, 3:7, 3:7] = True
        assert torch.equal(~y.isfinite(), seen) and (bits == 0x7F80 or torch.equal(y.isnan(), seen))
        assert torch.equal(gradient(double, x, y).isfinite()[:, :, 0], torch.ones(1, 40, 5, 5, dtype=torch.bool))


def test_gradient_of_planes(isa):
    x = make((2, 19, 4, 3, 5), torch.float32)
    for planes in ((0, 8), (0, 1), (3, 4), (2, 7), (7, 8)):
        dy = make((2, 19, planes[1] - planes[0], 6, 10), torch.float32)
        exact = gradient(lambda x, p=planes: definition(x)[:, :, p[0] : p[1]], x.double(), dy.double())
        assert error(gradient(lambda x, p=planes: double(x, *p), x, dy), exact) <= 1e-6


def test_gradient_of_the_gradient(isa):
    """Linear: the gradient of <dx(dy), v> by dy is the doubled v."""
    x, v = make((1, 5, 2, 3, 4), torch.float32).requires_grad_(), make((1, 5, 2, 3, 4), torch.float32)
    dy = make((1, 5, 2, 6, 8), torch.float32).requires_grad_()
    (dx,) = torch.autograd.grad(double(x, 1, 3), x, dy, create_graph=True)
    assert torch.equal(torch.autograd.grad(dx, dy, v)[0], double(v, 1, 3))


@by_cpu
def test_no_memory_is_taken():
    """With `out`, of x in a larger volume: nothing as large as a row is allocated."""
    x = make((1, 64, 12, 8, 8), torch.float32)[:, :, 3:9]
    out = make((1, 64, 12, 16, 16), torch.float32)[:, :, 2:7]
    with torch.profiler.profile(profile_memory=True) as profile:
        double(x, 4, 9, out=out)
    assert all(e.self_cpu_memory_usage <= 0 for e in profile.key_averages())


@by_cpu
def test_registration():
    x = make((2, 5, 3, 2, 4), torch.float32)
    with use_backend("cpu"), torch.no_grad():
        compiled = torch.compile(lambda x: double(x, 1, 5), fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(compiled, double(x, 1, 5))
    for adjoint, planes in ((False, (1, 5)), (True, (0, 6))):
        t = make((2, 5, 6, 4, 8), torch.float32) if adjoint else x.clone()
        torch.library.opcheck(resample_cpu._op, (t.requires_grad_(), *planes, 3, adjoint))


@by_cpu
def test_when_it_runs(monkeypatch):
    calls = []
    real = resample_cpu.double
    monkeypatch.setattr(resample_cpu, "double", lambda *args: calls.append(1) or real(*args))

    def ran(fn, *args):
        calls.clear()
        fn(*args)
        return bool(calls)

    x, w = make((1, 6, 3, 4, 2), torch.float32), torch.randn(3, 6, 3, 3, 3)
    assert ran(double, x) and ran(double, x.bfloat16()) and ran(double, x.clone().requires_grad_())
    assert not ran(double, x.contiguous()) and not ran(double, x.double()) and not ran(upsample, x)
    assert not ran(torch.func.vmap(double), x[None])  # plain torch has every transform
    with use_backend("reference"):
        assert not ran(double, x)
    assert ran(upsample_conv3d, x, w, None, "trilinear")
    assert torch.equal(upsample_conv3d(x, w, None, "trilinear"), conv3d(double(x), w))
    assert not ran(upsample_conv3d, x, w, None, "nearest")
    row = next(r for r in explain_rows("cpu") if r[1] == "upsample_trilinear")
    assert row[2] == "cpu" and row[3].startswith("compiled, ")


def test_refusals(isa):
    x = make((1, 2, 3, 4, 5), torch.float32)
    for bad, reason in ((x.double(), "float32 and bfloat16, not float64"), (x.contiguous(), "channels_last"),
                        (x.half(), "not float16")):
        with pytest.raises(RuntimeError, match=f"upsample: backend 'cpu' cannot run: it .*{reason}"):
            double(bad)
    with pytest.raises(ValueError, match=r"planes must be \(start, stop\), 0 <= start < stop <= 6, got \(2, 2\)"):
        double(x, 2, 2)
    with pytest.raises(ValueError, match=r"out must be torch.float32 \(1, 2, 1, 8, 10\) on cpu .* got torch.float32"):
        double(x, 2, 3, out=double(x))
    big = make((1, 2, 10, 8, 10), torch.float32)
    with pytest.raises(ValueError, match="out must be memory apart from x, got"):
        double(torch.as_strided(big, x.shape, x.stride(), 700), out=big[:, :, :6])
