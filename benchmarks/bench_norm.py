"""group_norm + silu on channels-last volumes, forward alone and with its gradient: torch against every backend.

Traffic model, in passes over x: forward reads x twice (statistics, application) and writes y; the gradient reads x and
dy twice and writes dx.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from t2ct.ops import group_norm_silu, use_backend
from t2ct.ops.dispatch import why_not

# (N, C, X, Y, Z), groups: the published VAE and UNet, the embedded model in training, one small level of a UNet
SHAPES = (((1, 64, 64, 64, 64), 32), ((1, 256, 16, 16, 16), 32), ((16, 32, 16, 16, 8), 8), ((4, 32, 64, 64, 32), 8),
          ((1, 512, 4, 4, 2), 32))
DTYPES = (torch.float32, torch.bfloat16)
PEERS = ("torch", "cpu", "reference")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def definition(x, w, b, groups):
    return F.silu(F.group_norm(x, groups, w, b, 1e-6))


def peer(name, device, dtype):
    if name == "torch":
        return definition
    reason = why_not(name, device, dtype)
    if reason:
        pytest.skip(reason)

    def call(*args):
        with use_backend(name):
            return group_norm_silu(*args)

    return call


def gradients(fn, dy, x, w, b, groups):
    return torch.autograd.grad(fn(x, w, b, groups), (x, w, b), dy)


@functools.lru_cache(maxsize=2)
def inputs(shape, groups, dtype, device):
    """Random tensors, and in float64 what the forward and the gradients should be; one computation for all peers."""
    torch.manual_seed(0)
    last = torch.channels_last_3d
    x = (torch.randn(shape, device=device) + 0.5).to(dtype).contiguous(memory_format=last)
    dy = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=last)
    w, b = (torch.randn(shape[1], device=device).to(dtype) for _ in range(2))
    exact = [t.double().contiguous().requires_grad_() for t in (x, w, b)]
    y = definition(*exact, groups)
    slopes = torch.autograd.grad(y, exact, dy.double())
    return (x, w, b), dy, y.detach(), slopes


@pytest.mark.parametrize("name", PEERS)  # varies fastest: the peers of a row run one after the other
@pytest.mark.parametrize("gradient", (False, True), ids=["forward", "gradient"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape,groups", SHAPES, ids=str)
def test_group_norm_silu(name, shape, groups, dtype, gradient, device, measure, benchmark):
    kind = "forward + gradient" if gradient else "forward"
    benchmark.group = f"group_norm_silu {kind} {shape} {str(dtype).removeprefix('torch.')}"
    benchmark.extra_info["peer"] = name
    fn = peer(name, device, dtype)
    (x, w, b), dy, y, slopes = inputs(shape, groups, dtype, device)
    if gradient:
        leaves = [t.detach().requires_grad_() for t in (x, w, b)]
        measure(lambda: gradients(fn, dy, *leaves, groups), slopes, 8 * x.nbytes, 0, TOLERANCE[dtype])
    else:
        with torch.no_grad():
            measure(lambda: (fn(x, w, b, groups),), (y,), 3 * x.nbytes, 0, TOLERANCE[dtype])
