"""Every op, backend, dtype, shape and layout against float64; registration and gradients checked by torch itself."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, norm_inputs

from t2ct.ops import (
    conv,
    explain,
    explain_rows,
    group_apply,
    group_norm,
    group_norm_silu,
    group_stats,
    merge,
    merge_stats,
    norm,
    resample,
    upsample_conv,
    use_backend,
)
from t2ct.ops.attention import TABLES as ATTENTION
from t2ct.ops.dispatch import BACKENDS, choose, large_pages, native, why_not

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAST = {5: torch.channels_last_3d, 4: torch.channels_last}
name = {"ids": lambda v: getattr(v, "name", str(v))}


def last(x):
    return x.contiguous(memory_format=torch.channels_last_3d)


def layouts(x):
    """x in the memory formats of its rank, and as a view with gaps."""
    yield x.contiguous()
    if x.dim() in LAST:
        yield x.contiguous(memory_format=LAST[x.dim()])
    wide = torch.cat([x, x], 1)
    yield (wide.contiguous(memory_format=LAST[x.dim()]) if x.dim() in LAST else wide)[:, : x.shape[1]]


@pytest.fixture
def forced(case, backend, device, dtype):
    reason = why_not(backend, device, dtype)
    if reason:
        pytest.skip(reason)
    torch.manual_seed(0)
    with use_backend(backend):
        yield


def runs(case, backend, x):
    return why_not(backend, x.device.type, x.dtype, norm.is_channels_last(norm._dense(x))) is None


def error(y, oracle):
    return ((y.double() - oracle).norm() / (oracle.norm() + 1e-30)).item()


def run(fn, tensors, constants, dy):
    tensors = [t.detach().requires_grad_() for t in tensors]
    y = fn(*tensors, *constants)
    return [y.detach(), *torch.autograd.grad(y, tensors, dy.to(y.dtype))]


GRID = [(case, backend, dtype) for case in CASES for backend in BACKENDS if backend in case.table for dtype in DTYPES]
each = pytest.mark.parametrize("case,backend,dtype", GRID, **name)
each_device = pytest.mark.parametrize("device", DEVICES)
each_case = pytest.mark.parametrize("case", CASES, **name)


@each
@each_device
def test_matches_float64(case, backend, device, dtype, forced):
    ran = 0
    for shape in case.shapes:
        (x, *rest), constants = case.make(shape, dtype, device)
        dy = torch.randn_like(x)
        oracle = run(case.definition, [t.double() for t in (x, *rest)], constants, dy)
        eager = run(case.definition, [x, *rest], constants, dy)
        for laid in layouts(x):
            if not runs(case, backend, laid):
                continue
            ran += 1
            mine = run(case.op, [laid, *rest], constants, dy)
            assert mine[0].stride() == torch.empty_like(laid).stride() and mine[0].dtype == dtype
            for ours, theirs, exact in zip(mine, eager, oracle, strict=True):
                bound = 2 * error(theirs, exact) + max(4 * torch.finfo(dtype).eps, 1e-10)
                assert error(ours, exact) <= bound, (shape, laid.stride(), error(ours, exact), bound)  # NaN fails too
    assert ran


@pytest.mark.parametrize("case,backend,dtype", [g for g in GRID if g[0].name == "group_norm_silu"], **name)
@each_device
def test_registration(case, backend, device, dtype, forced):
    (x, *rest), constants = case.make(case.shapes[0], dtype, device)
    for laid in layouts(x) if dtype == torch.float32 else [last(x)]:
        if runs(case, backend, laid):
            tensors = [t.detach().requires_grad_() for t in (laid, *rest)]
            torch.library.opcheck(case.raw, (*tensors, *constants, *case.options))


@each_case
@pytest.mark.parametrize("direct", [True, False], ids=["eager", "custom_op"])
def test_gradients(case, direct):
    tensors, constants = case.make((2, 4, 2, 3, 1), torch.float64, "cpu")
    call = case.op if direct else lambda *args: case.raw(*args, *case.options)[0]
    assert torch.autograd.gradcheck(lambda *t: call(*t, *constants), [t.requires_grad_() for t in tensors])


@each_case
def test_traced(case):
    """Compilation, meta tensors and plain calls agree in values, shapes and strides."""
    (x, *rest), constants = case.make((2, 8, 3, 4, 5), torch.float32, "cpu")
    x = x.contiguous(memory_format=torch.channels_last_3d)
    y = case.op(x, *rest, *constants)
    compiled = torch.compile(case.op, fullgraph=True, backend="aot_eager")(x, *rest, *constants)
    assert torch.equal(y, compiled) and compiled.stride() == y.stride()
    meta = case.op(*[t.to("meta") for t in (x, *rest)], *constants)
    assert meta.is_meta and (meta.shape, meta.stride(), meta.dtype) == (y.shape, y.stride(), y.dtype)


# ------------------------------------------------------------------------------------------------- the cpu kernels


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), **name)
def test_every_instruction_set(isa, dtype):
    for case in CASES:
        for shape in (s for s in case.shapes if len(s) == 5):
            (x, *rest), constants = case.make(shape, dtype, "cpu")
            x, dy = last(x), last(torch.randn(shape).to(dtype))
            oracle = run(case.definition, [t.double() for t in (x, *rest)], constants, dy)
            eager = run(case.definition, [x, *rest], constants, dy)
            for ours, theirs, exact in zip(run(case.op, [x, *rest], constants, dy), eager, oracle, strict=True):
                assert error(ours, exact) <= 2 * error(theirs, exact) + 4 * torch.finfo(dtype).eps, shape


def test_statistics_keep_their_digits(isa):
    """A mean a thousand times the deviation: E[x^2] - E[x]^2 in float32 would keep about one digit of the variance."""
    x = last(torch.randn(2, 24, 20, 21, 22) + 1000)
    mean, m2, count = group_stats(x, 8)
    exact = x.double().reshape(2, 8, -1)
    assert count == exact.shape[2]
    assert ((mean - exact.mean(2)).abs() <= 1e-9 * 1000).all()
    assert ((m2 / count / exact.var(2, correction=0) - 1).abs() <= 1e-5).all()


def test_statistics_of_outliers(isa):
    """The guess about which sums are taken may be poor, never harmful: one huge voxel among those it sees, or not."""
    for voxel in (0, 1, 8, 100, 728):
        x = torch.randn(1, 32, 729)
        x[0, :, voxel] = 1e4
        mean, m2, count = group_stats(last(x.view(1, 32, 9, 9, 9)), 32)
        exact = x.double()
        variance = exact.var(2, correction=0)
        assert ((m2 / count / variance - 1).abs() <= 1e-5).all()
        assert ((mean - exact.mean(2)).abs() <= 1e-6 * variance.sqrt()).all()


def test_constant_input(isa):
    x = last(torch.full((1, 16, 5, 5, 5), 0.1))
    mean, m2, _ = group_stats(x, 4)
    assert (m2 >= 0).all() and (m2 <= 1e-10).all() and ((mean - 0.1).abs() <= 1e-8).all()
    y = group_norm(x, torch.ones(16), torch.full((16,), 2.0), 4)
    assert ((y - 2).abs() <= 1e-3).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), **name)
def test_same_bits_on_any_number_of_threads(isa, dtype):
    (x, w, b), (groups, eps) = norm_inputs((2, 32, 20, 20, 21), dtype, "cpu")
    x, dy = last(x), last(torch.randn_like(x))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([*group_stats(x, groups)[:2], *run(group_norm_silu, [x, w, b], (groups, eps), dy)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def identity(x, silu):
    """group_apply with statistics and parameters that leave x alone, so that only silu (or nothing) is applied."""
    x = last(x.reshape(1, 1, 1, 1, -1))
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    return group_apply(x, zero, one, one[0], zero[0], 1, silu).flatten()


def test_silu_within_four_ulp(isa):
    x = torch.cat([torch.linspace(-87, 120, 1_000_003), torch.logspace(-30, 0, 1000), -torch.logspace(-30, 0, 1000)])
    exact = F.silu(x.double())
    ulp = torch.finfo(torch.float32).eps * torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(1e-37))))
    assert ((identity(x, True).double() - exact).abs() <= 4 * ulp).all()
    far = identity(torch.tensor([-88.0, -100.0, -1e4, -0.0, 1e30, torch.nan]), True)
    assert (far[:3].abs() <= 1e-33).all() and far[3] == 0 and far[4] == 1e30 and far[5].isnan()


def test_bfloat16_rounds_to_nearest_even(isa):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    same = identity(bits, False)
    numbers = ~bits.isnan()
    assert torch.equal(same[numbers], bits[numbers]) and same[~numbers].isnan().all()
    x, scale = last(torch.randn(1, 1, 30, 30, 30).bfloat16()), torch.rand(1) + 0.5
    y = group_apply(x, torch.zeros(1, 1), torch.ones(1, 1), scale, torch.zeros(1), 1)
    assert torch.equal(y, (x.float() * scale).bfloat16())


# -------------------------------------------------------------------------------- statistics and application apart


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), **name)
@pytest.mark.parametrize("silu", (False, True))
def test_slabs_equal_the_whole(backend, dtype, silu):
    if why_not(backend, "cpu", dtype):
        pytest.skip(why_not(backend, "cpu", dtype))
    torch.manual_seed(0)
    (x, w, b), (groups, eps) = norm_inputs((1, 12, 13, 6, 5), dtype, "cpu")
    x = last(x)
    with use_backend(backend):
        slabs = x.split(4, dim=2)
        mean, m2, count = merge_stats(*(group_stats(slab, groups) for slab in slabs))
        assert count == 13 * 6 * 5 * 12 // groups
        for mine, whole in zip((mean, m2), group_stats(x, groups)[:2], strict=True):
            assert ((mine - whole).abs() <= 1e-5 * whole.abs()).all()
        rstd = (m2 / count + eps).rsqrt()
        expected = (group_norm_silu if silu else group_norm)(x, w, b, groups, eps)
        for slab in slabs:  # in place, in x itself
            assert group_apply(slab, mean, rstd, w, b, groups, silu, out=slab) is slab
    assert error(x, expected.double()) <= 2 * torch.finfo(dtype).eps


def test_out_must_be_like_x():
    x, w, s = last(torch.randn(1, 4, 2, 2, 2)), torch.ones(4), torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"out must be like x, torch.float32 \(1, 4, 2, 2, 2\).* got torch.bfloat16"):
        group_apply(x, s, s, w, w, 2, out=torch.empty_like(x, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="strides"):
        group_apply(x, s, s, w, w, 2, out=x.contiguous())
    with pytest.raises(ValueError, match=r"mean must be \(1, 2\) on cpu, got \(2,\) on cpu"):
        group_apply(x, s[0], s, w, w, 2)


# ------------------------------------------------------------------------------------------- contract and dispatch


@each_case
def test_bad_input(case):
    x, w = torch.randn(2, 6, 3, 3, 3), torch.ones(6)
    for bad, groups in ((x, 4), (x, 0), (x[0, 0], 2), (x[:0], 2), (x[:, :, :0], 2)):
        with pytest.raises(ValueError, match=rf"{case.name}: x must be non-empty.* got"):
            case.op(bad, w, w, groups)
    with pytest.raises(ValueError, match=rf"{case.name}: bias must be \(6,\) on cpu, got \(5,\) on cpu"):
        case.op(x, w, w[:5], 2)
    with pytest.raises(ValueError, match=r"weight must be \(6,\) on cpu, got \(6,\) on meta"):
        case.op(x, w.to("meta"), w, 2)
    with pytest.raises(TypeError, match="x must be floating point, got torch.int64"):
        case.op(x.long(), w, w, 2)


def test_no_silent_fallback():
    x, w = torch.randn(1, 4, 2, 2, 2, dtype=torch.float64), torch.ones(4)
    with use_backend("cpu"), pytest.raises(RuntimeError, match="group_norm: backend 'cpu' cannot run: "):
        group_norm(x, w, w, 2)
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'fast'"), use_backend("fast"):
        pass
    with use_backend("reference"):
        assert choose("group_norm", norm.FORWARD, last(x.float()))[0] == "reference"
        with use_backend(None):
            assert choose("group_norm", norm.FORWARD, last(x.float()))[0] == ("cpu" if native() else "reference")
    assert choose("group_norm", norm.FORWARD, x.float())[0] == "reference"
    if native():
        assert "channels_last" in why_not("cpu", "cpu", torch.float32, False)


def test_explain_lists_every_op():
    rows = explain_rows("cpu")
    assert [row[1] for row in rows] == [
        *norm.TABLES, *conv.TABLES, *upsample_conv.TABLES, *merge.TABLES, *resample.TABLES, *ATTENTION,
    ]  # fmt: skip
    assert all(row[0] == "cpu" and row[3] for row in rows)
    with use_backend("reference"):
        assert all(row[2] == "reference" and "forced" in row[3] for row in explain_rows("cpu"))
    assert len(explain("cpu").split("\n\n")[0].splitlines()) == len(rows) + 1
    assert all(row[2] in ("reference", "sdpa") and row[3] for row in explain_rows("cuda"))


def test_without_the_extension():
    """Where _C is missing the reference runs and explain says why; T2CT_BACKEND is read, and refused if unknown."""
    code = """
import importlib, os, sys
sys.modules["t2ct._C"] = None
import torch
from t2ct.ops import dispatch, explain, group_norm_silu, use_backend
print("forced:", explain("cpu"))
with use_backend(None):
    print("free:", explain("cpu"))
    x = torch.randn(1, 4, 3, 3, 3).contiguous(memory_format=torch.channels_last_3d)
    print(group_norm_silu(x, torch.ones(4), torch.zeros(4), 2).shape)
for attempt in ("cpu", "fast"):
    try:
        os.environ["T2CT_BACKEND"] = attempt
        importlib.reload(dispatch)
        dispatch.choose("some_op", {"cpu": None, "reference": None}, x)
    except (RuntimeError, ValueError) as error:
        print(error)
"""
    env = os.environ | {"T2CT_BACKEND": "reference"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    forced, free = run.stdout.split("free:")
    assert "reference is forced" in forced and "not built" not in forced
    assert re.search(r"\bgroup_norm +reference  .*cpu: t2ct._C was not built", free)
    assert "torch.Size([1, 4, 3, 3, 3])" in free
    assert "some_op: backend 'cpu' cannot run: t2ct._C was not built" in free
    assert f"backend must be one of {BACKENDS}, got 'fast'" in free


@pytest.mark.skipif(sys.platform != "linux" or native() is None, reason="looks into /proc; takes the compiled module")
def test_large_results_lie_on_large_pages():
    def flags(x):
        """What the system notes of the memory where the middle of x lies."""
        middle, inside = x.data_ptr() + x.nbytes // 2, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(found[1], 16) <= middle < int(found[2], 16)
            elif inside and line.startswith("VmFlags:"):
                return line.split()[1:]
        raise AssertionError("the tensor lies nowhere")

    x = torch.randn(1, 64, 40, 64, 64).to(memory_format=torch.channels_last_3d)  # beyond what malloc keeps: 42 MB
    weight, bias = torch.ones(64), torch.zeros(64)
    with use_backend("cpu"):
        assert "hg" in flags(group_norm_silu(x, weight, bias, 32))
    assert "hg" not in flags(torch.empty_like(x))
    small = torch.empty(3)
    assert large_pages(small) is small
