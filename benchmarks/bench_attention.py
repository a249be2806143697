"""Attention over the tokens of a volume: torch's backends, xformers and ours take turns in one run."""

import pytest
import torch
import torch.nn.functional as F
import work
from conftest import CUDA, DEVICE
from torch.nn.attention import SDPBackend, sdpa_kernel

from t2ct.ops import attention, use_backend
from t2ct.ops.attention import why_not_attention

# B, H, N, D
SHAPES = [(2, 16, n, d) for n in (2048, 8192, 32768) for d in (32, 64)] + [(1, 8, 131072, 32)]
SHAPES, DTYPES = (SHAPES, (torch.float16, torch.bfloat16)) if CUDA else ([(1, 8, 2048, 32)], (torch.float32,))
TORCH = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION,
         "efficient": SDPBackend.EFFICIENT_ATTENTION}  # fmt: skip
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def by_torch(backend):
    def call(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def ours(backend):
    def call(q, k, v):
        with use_backend(backend):
            return attention(q, k, v)

    return call


def peers(dtype):
    """name -> function, of all that run here."""
    found = {f"torch {name}": by_torch(backend) for name, backend in TORCH.items()} if CUDA else {}
    if not CUDA:
        found["torch"] = F.scaled_dot_product_attention
    if why_not_attention("xformers", DEVICE, dtype) is None:
        found["xformers"] = ours("xformers")
    found["t2ct"] = ours(None)
    if CUDA and why_not_attention("triton", DEVICE, dtype) is None:
        found["t2ct triton"] = ours("triton")
    return found


def make(b, h, n, d, dtype):
    torch.manual_seed(0)
    return [torch.randn(b, n, h, d, device=DEVICE).to(dtype).transpose(1, 2) for _ in "qkv"]


def gradients(fn, q, k, v, do):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    y = fn(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, do)]


def error(y, exact):
    return ((y.double() - exact.double()).norm() / exact.double().norm()).item()


def right(name, fn, d, dtype):
    """Is the peer right on a small odd case? False where torch has no such kernel; ours and xformers must have it."""
    q, k, v = make(1, 2, 300, d, dtype)
    exact = gradients(ours("reference"), *(t.double() for t in (q, k, v)), torch.ones_like(q, dtype=torch.float64))
    try:
        mine = gradients(fn, q, k, v, torch.ones_like(q))
    except RuntimeError:
        if not name.startswith("torch "):
            raise
        return False
    assert all(error(a, b) <= TOLERANCE[dtype] for a, b in zip(mine, exact, strict=True)), "wrong before fast"
    return True


@pytest.mark.parametrize("gradient", (False, True), ids=("forward", "forward + backward"))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda v: str(v).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(shape, dtype, gradient, race, benchmark):
    b, h, n, d = shape
    kind = "forward + backward" if gradient else "forward"
    benchmark.group = f"attention {kind} {shape} {dtype}".replace("torch.", "")
    q, k, v = make(*shape, dtype)
    todo = {name: fn for name, fn in peers(dtype).items() if right(name, fn, d, dtype)}
    do = torch.randn_like(q)
    if gradient:
        todo = {name: lambda fn=fn: gradients(fn, q, k, v, do) for name, fn in todo.items()}
    else:
        todo = {name: lambda fn=fn: fn(q, k, v) for name, fn in todo.items()}
    with torch.set_grad_enabled(gradient):
        race(todo, work.attention(b, h, n, d, q.element_size(), gradient), rounds=5 if n > 100_000 else 15)
