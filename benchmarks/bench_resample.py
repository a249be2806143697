"""Trilinear doubling of channels-last volumes: torch against csrc, into new memory, into memory that is there (`out`),
and with the gradient.

Traffic model: x read and y written, once; the gradient reads dy and writes dx. New memory is given by the system page
by page, zeroed, to both alike, which takes as long as the work itself.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from t2ct.ops import upsample
from t2ct.ops.dispatch import forced, why_not

# (N, C, X, Y, Z): two doublings of the published VAE, two of the embedded model's size, one small
SHAPES = ((1, 64, 32, 32, 32), (1, 128, 32, 64, 64), (1, 32, 24, 24, 12), (1, 16, 48, 48, 24), (1, 64, 4, 4, 4))
DTYPES = (torch.float32, torch.bfloat16)
PEERS = ("torch", "cpu")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def definition(x):
    return F.interpolate(x, scale_factor=2.0, mode="trilinear")


def into(x, out):
    size = [2 * m for m in x.shape[2:]]
    return torch.ops.aten.upsample_trilinear3d.out(x, size, False, 2.0, 2.0, 2.0, out=out)


NEW = {"torch": definition, "cpu": lambda x: upsample(x, "trilinear")}
OUT = {"torch": into, "cpu": lambda x, out: upsample(x, "trilinear", out=out)}


def gradient(fn, x, dy):
    return torch.autograd.grad(fn(x), x, dy)


@functools.lru_cache(maxsize=1)
def inputs(shape, dtype, device, kind):
    """Random x and dy, and what the row should give in float64; one computation for both peers."""
    torch.manual_seed(0)
    last = torch.channels_last_3d
    x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=last)
    size = (*shape[:2], *(2 * m for m in shape[2:]))
    if kind != "forward + gradient":
        return x, torch.zeros(size, dtype=dtype, device=device).contiguous(memory_format=last), definition(x.double())
    dy = torch.randn(size, device=device).to(dtype).contiguous(memory_format=last)
    return x, dy, gradient(definition, x.double().requires_grad_(), dy.double())[0]


@pytest.mark.parametrize("name", PEERS)  # varies fastest: the peers of a row run one after the other
@pytest.mark.parametrize("kind", ("forward", "forward into out", "forward + gradient"))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_trilinear(name, shape, dtype, kind, device, measure, benchmark):
    reason = why_not("cpu", device, dtype) or (f"{forced()} is forced" if forced() else None)
    if reason:
        pytest.skip(reason)
    benchmark.group = f"upsample trilinear {kind} {shape} {str(dtype).removeprefix('torch.')}"
    benchmark.extra_info["peer"] = name
    x, other, exact = inputs(shape, dtype, device, kind)
    if kind == "forward + gradient":
        leaf = x.detach().requires_grad_()
        measure(lambda: gradient(NEW[name], leaf, other), (exact,), 18 * x.nbytes, 0, TOLERANCE[dtype])
        return
    with torch.no_grad():
        fn = OUT[name] if kind == "forward into out" else NEW[name]
        args = (x, other) if kind == "forward into out" else (x,)
        measure(lambda: (fn(*args),), (exact,), 9 * x.nbytes, 0, TOLERANCE[dtype])
