"""GroupNorm + SiLU + 3x3x3 convolution, and nearest doubling + convolution: every form takes turns in one run.

Each peer first proves its values and gradients against float64 on a small odd volume of the same width, then, at the
size that is timed, that it agrees with the others. The GPU's matrix is kernels' own; the CPU's is small.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import work
from conftest import CUDA, DEVICE
from t2ct.kernels import block_plan

from t2ct.ops import group_norm_silu, group_norm_silu_conv3d, upsample_conv3d, use_backend
from t2ct.ops.dispatch import why_not
from t2ct.stream.budget import free_memory

LAST = torch.channels_last_3d
if CUDA:
    SIZES = [(c, size) for size in ((128, 128, 32), (256, 256, 64)) for c in (64, 128, 256, 512)]
    SIZES += [(c, (512, 512, 128)) for c in (64, 128)]
    DTYPES = (torch.float16, torch.bfloat16)
else:
    SIZES, DTYPES = [(64, (64, 64, 64))], (torch.float32, torch.bfloat16)
GROUPS = 32
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
ids = {"ids": lambda v: str(v).removeprefix("torch.")}


def eager(x, gw, gb, w, b):
    return F.conv3d(F.silu(F.group_norm(x, GROUPS, gw, gb, 1e-6)), w, b, padding=1)


def forced(backend, fn):
    def call(*args):
        with use_backend(backend):
            return fn(*args)

    return call


def planned(way, fn):
    """fn with the norm in a pass of its own or where the convolution loads its input, whatever the plan says."""
    plan = block_plan.forward

    def call(*args):
        block_plan.forward = lambda *a: (way, plan(*a)[1])
        try:
            return fn(*args)
        finally:
            block_plan.forward = plan

    return call


def ours(x, gw, gb, w, b):
    return group_norm_silu_conv3d(x, gw, gb, w, b, GROUPS)


def tensors(c, size, dtype):
    torch.manual_seed(0)
    x = (torch.randn(1, c, *size, device=DEVICE, dtype=dtype) + 0.5).contiguous(memory_format=LAST)
    gw, gb, b = torch.randn(3, c, device=DEVICE).to(dtype)
    return x, gw, gb, (torch.randn(c, c, 3, 3, 3, device=DEVICE) / (27 * c) ** 0.5).to(dtype), b


def peers(dtype):
    """name -> (function, memory format it likes, backend that is forced while it and its gradient run)"""
    found = {"torch": (eager, torch.contiguous_format, None), "torch channels-last": (eager, LAST, None),
             "t2ct": (ours, LAST, None)}  # fmt: skip
    if CUDA:
        compiled = torch.compile(eager, mode="max-autotune-no-cudagraphs")
        found["torch.compile"] = (compiled, LAST, None)
        if why_not("triton", DEVICE, dtype) is None:
            for way in ("apply", "prologue"):
                found[f"t2ct triton, {way}"] = (planned(way, ours), LAST, "triton")
    return found


def laid(case, layout):
    x, gw, gb, w, b = case
    return x.contiguous(memory_format=layout), gw, gb, w.contiguous(memory_format=layout), b


def values(fn, case, dy):
    return [fn(*case)]


def gradients(fn, case, dy):
    leaves = [t.detach().requires_grad_() for t in case]
    y = fn(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def error(y, exact):
    return ((y.double() - exact.double()).norm() / exact.double().norm()).item()


def prove(fn, layout, backend, c, dtype):
    case = tensors(c, (9, 7, 10), dtype)
    dy = torch.randn_like(case[0])
    exact = gradients(eager, [t.double().contiguous() for t in case], dy.double())
    for mine, truth in zip(forced(backend, gradients)(fn, laid(case, layout), dy), exact, strict=True):
        assert error(mine, truth) <= TOLERANCE[dtype], "wrong before fast"


@pytest.mark.parametrize("gradient", (False, True), ids=("forward", "forward + gradient"))
@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("c,size", SIZES, **ids)
def test_chain(c, size, dtype, gradient, race, benchmark):
    name = f"group_norm_silu_conv3d {'forward + gradient' if gradient else 'forward'} {c} at {size} {dtype}"
    benchmark.group = name.replace("torch.", "")
    case = tensors(c, size, dtype)
    itemsize, shape = case[0].element_size(), tuple(case[0].shape)
    needed, free = (12 if gradient else 6) * case[0].nbytes, free_memory(DEVICE)  # both layouts, what eager keeps
    if needed > free:
        pytest.skip(f"wanted {needed / 1e9:.0f} GB for every peer's activations, got {free / 1e9:.0f} GB")
    todo, first, dy = {}, None, torch.randn_like(case[0]) if gradient else None
    for peer, (fn, layout, backend) in peers(dtype).items():
        prove(fn, layout, backend, c, dtype)
        arguments = laid(case, layout)
        run = partial(forced(backend, gradients if gradient else values), fn, arguments, dy)
        try:
            with torch.set_grad_enabled(gradient):
                y = run()[0][..., :16, :16, :16].float()
        except RuntimeError as reason:  # more numbers than a peer takes must not cost the row of those that do
            if peer.startswith("t2ct"):
                raise
            benchmark.extra_info[f"{peer} left out"] = str(reason).partition("\n")[0]
            print(f"{peer} left out of {name}: {reason}")
            continue
        first = y if first is None else first
        assert error(y, first) <= 2 * TOLERANCE[dtype]
        todo[peer] = run
    amount = work.norm_silu(shape, itemsize, gradient) + work.conv(shape, c, itemsize, 27, gradient)
    with torch.set_grad_enabled(gradient):
        race(todo, amount)


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("c,size", SIZES[:4] if CUDA else [(128, (32, 32, 16)), (64, (32, 32, 32))], **ids)
def test_doubling(c, size, dtype, race, benchmark):
    """Nearest doubling and convolution: the two in turn against the folded one."""
    benchmark.group = f"upsample_conv3d {c} at {size} {dtype}".replace("torch.", "")
    x, _, _, w, b = tensors(c, size, dtype)

    def doubled(x):
        return F.conv3d(F.interpolate(x, scale_factor=2.0, mode="nearest"), w, b, padding=1)

    plain = x.contiguous()
    todo = {"torch": lambda: doubled(plain), "torch channels-last": lambda: doubled(x)}
    todo["t2ct"] = lambda: upsample_conv3d(x, w, b)
    if CUDA:
        todo["t2ct triton"] = forced("triton", todo["t2ct"])
    with torch.no_grad():
        small = x[..., :6, :5, :7].contiguous(memory_format=LAST)
        exact = F.conv3d(F.interpolate(small.double(), scale_factor=2.0), w.double(), b.double(), padding=1)
        for backend in (None, "triton") if CUDA else (None, "cpu"):
            assert error(forced(backend, upsample_conv3d)(small, w, b), exact) <= TOLERANCE[dtype], "wrong before fast"
        race(todo, work.conv((1, c, *(2 * m for m in size)), c, x.element_size(), 8))


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("c,size", SIZES, **ids)
def test_norm(c, size, dtype, race, benchmark):
    benchmark.group = f"group_norm_silu {c} at {size} {dtype}".replace("torch.", "")
    x, gw, gb, _, _ = tensors(c, size, dtype)

    def definition(x, gw, gb):
        return F.silu(F.group_norm(x, GROUPS, gw, gb, 1e-6))

    def mine(x, gw, gb):
        return group_norm_silu(x, gw, gb, GROUPS)

    plain = x.contiguous()
    todo = {"torch": lambda: definition(plain, gw, gb), "torch channels-last": lambda: definition(x, gw, gb)}
    todo["t2ct"] = lambda: mine(x, gw, gb)
    if CUDA:
        compiled = torch.compile(definition)
        todo["torch.compile"] = lambda: compiled(x, gw, gb)
        todo["t2ct triton"] = lambda: forced("triton", mine)(x, gw, gb)
    with torch.no_grad():
        small = x[..., :9, :7, :5].contiguous(memory_format=LAST)
        exact = definition(small.double(), gw.double(), gb.double())
        for backend in (None, "triton") if CUDA else (None, "cpu"):
            assert error(forced(backend, mine)(small, gw, gb), exact) <= TOLERANCE[dtype], "wrong before fast"
        race(todo, work.norm_silu(tuple(x.shape), x.element_size()))
