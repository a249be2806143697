"""Trilinear doubling of channels-last volumes: torch against t2ct, into new memory, into memory that is there, and with
the gradient. The peers take turns; each first proves itself against float64 on a small odd volume of the same width.
Channels-last is what the networks keep their volumes in; torch's own format is no peer there.

Traffic model: x read and y written, once; the gradient reads dy and writes dx. New memory comes from the system page by
page, zeroed, to all alike, and that takes as long as the work.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from work import Work

from t2ct.ops import upsample

LAST = torch.channels_last_3d
# (N, C, X, Y, Z): two doublings of the published VAE, two of the embedded model's size, one small
SHAPES = ((1, 64, 32, 32, 32), (1, 128, 32, 64, 64), (1, 32, 24, 24, 12), (1, 16, 48, 48, 24), (1, 64, 4, 4, 4))
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
KINDS = ("forward", "forward into memory that is there", "forward + gradient")
ids = {"ids": lambda v: str(v).removeprefix("torch.")}


def definition(x):
    return F.interpolate(x, scale_factor=2.0, mode="trilinear")


def into(x, out):
    size = [2 * m for m in x.shape[2:]]
    return torch.ops.aten.upsample_trilinear3d.out(x, size, False, 2.0, 2.0, 2.0, out=out)


def ours(x, out=None):
    return upsample(x, "trilinear", out=out)


PEERS = {"torch channels-last": (definition, into), "t2ct": (ours, ours)}  # into new memory, into memory that is there


def job(name, kind, shape, dtype):
    """A function of nothing that does the work and returns its result, and that result in float64 as a function."""
    new, there = PEERS[name]
    torch.manual_seed(0)
    x = torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=LAST)
    other = torch.randn((*shape[:2], *(2 * m for m in shape[2:])), device=DEVICE).to(dtype)
    other = other.contiguous(memory_format=LAST)
    if kind == KINDS[0]:
        return lambda: new(x), lambda: definition(x.double())
    if kind == KINDS[1]:
        return lambda: there(x, other), lambda: definition(x.double())

    def gradient(fn, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(fn(x), x, other.to(x.dtype))[0]

    return lambda: gradient(new, x), lambda: gradient(definition, x.double())


def error(y, exact):
    return ((y.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("shape", SHAPES, **ids)
def test_trilinear(shape, dtype, kind, race, benchmark):
    benchmark.group = f"upsample trilinear {kind} {shape} {dtype}".replace("torch.", "")
    todo, first = {}, None
    with torch.no_grad():
        for name in PEERS:
            run, exact = job(name, kind, (1, shape[1], 5, 3, 7), dtype)
            assert error(run(), exact()) <= TOLERANCE[dtype], "wrong before fast"
            todo[name], _ = job(name, kind, shape, dtype)
            corner = todo[name]()[..., :16, :16, :16].float()
            first = corner if first is None else first
            assert error(corner, first) <= 2 * TOLERANCE[dtype], "wrong before fast"
        nbytes = shape[1] * shape[2] * shape[3] * shape[4] * dtype.itemsize
        race(todo, Work((18 if kind == KINDS[2] else 9) * nbytes))
