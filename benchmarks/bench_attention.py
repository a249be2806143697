"""Attention over the tokens of a volume: torch's backends, xformers and ours take turns in one run.

Three forms: q, k, v alone; with a bias of every pair of tokens, shared by the batch; and by the offset of two tokens on
a grid. Only Triton adds the last without storing pairs; the others make a bias of the table, as in a network, where the
table is learned or computed. Gradients include the bias's or the table's.
"""

import pytest
import torch
import torch.nn.functional as F
import work
from conftest import CUDA, DEVICE
from torch.nn.attention import SDPBackend, sdpa_kernel

from t2ct.ops import attention, use_backend
from t2ct.ops.attention import expand_relative, why_not_attention

# B, H, N, D
SHAPES = [(2, 16, n, d) for n in (2048, 8192, 32768) for d in (32, 64)] + [(1, 8, 131072, 32)]
GRIDS = {2048: (32, 64), 8192: (64, 128), 300: (15, 20)}  # tokens -> height and width
SHAPES, DTYPES = (SHAPES, (torch.float16, torch.bfloat16)) if CUDA else ([(1, 8, 2048, 32)], (torch.float32,))
TORCH = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION,
         "efficient": SDPBackend.EFFICIENT_ATTENTION}  # fmt: skip
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


CASES = [(shape, "plain") for shape in SHAPES]
CASES += [(s, form) for s in SHAPES for form in ("bias", "relative") if s[2] in GRIDS]  # larger, pairs fill the memory


def by_torch(*backends):
    def call(q, k, v, extra=None, form="plain"):
        bias = expand_relative(extra, *GRIDS[q.shape[2]]) if form == "relative" else extra
        if not backends:
            return F.scaled_dot_product_attention(q, k, v, bias)
        with sdpa_kernel(list(backends)):
            return F.scaled_dot_product_attention(q, k, v, bias)

    return call


def ours(backend):
    def call(q, k, v, extra=None, form="plain"):
        with use_backend(backend):
            if form == "relative":
                return attention(q, k, v, relative_bias=(extra, GRIDS[q.shape[2]]))
            return attention(q, k, v, extra)

    return call


def peers(dtype):
    """name -> function, of all that run here."""
    found = {f"torch {name}": by_torch(backend) for name, backend in TORCH.items()} if CUDA else {}
    if not CUDA:
        found["torch"] = by_torch()
    if why_not_attention("xformers", DEVICE, dtype) is None:
        found["xformers"] = ours("xformers")
    found["t2ct"] = ours(None)
    if CUDA and why_not_attention("triton", DEVICE, dtype) is None:
        found["t2ct triton"] = ours("triton")
    return found


def make(b, h, n, d, dtype, form):
    """q, k, v and what the form takes besides, if anything."""
    torch.manual_seed(0)
    tensors = [torch.randn(b, n, h, d, device=DEVICE).to(dtype).transpose(1, 2) for _ in "qkv"]
    if form == "bias":
        tensors.append(torch.randn(1, h, n, n, device=DEVICE, dtype=dtype))
    if form == "relative":
        height, width = GRIDS[n]
        tensors.append(torch.randn(h, (2 * height - 1) * (2 * width - 1), device=DEVICE, dtype=dtype))
    return tensors


def gradients(fn, tensors, form, do):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = fn(*leaves, form=form)
    return [y.detach(), *torch.autograd.grad(y, leaves, do)]


def error(y, exact):
    return ((y.double() - exact.double()).norm() / exact.double().norm()).item()


def right(name, fn, d, dtype, form):
    """Is the peer right on a small odd case? False where torch has no such kernel; ours and xformers must have it."""
    tensors = make(1, 2, 300, d, dtype, form)
    one = torch.ones_like(tensors[0])
    exact = gradients(ours("reference"), [t.double() for t in tensors], form, one.double())
    try:
        mine = gradients(fn, tensors, form, one)
    except RuntimeError:
        if not name.startswith("torch "):
            raise
        return False
    assert all(error(a, b) <= TOLERANCE[dtype] for a, b in zip(mine, exact, strict=True)), "wrong before fast"
    return True


@pytest.mark.parametrize("gradient", (False, True), ids=("forward", "forward + backward"))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda v: str(v).removeprefix("torch."))
@pytest.mark.parametrize("shape,form", CASES, ids=str)
def test_attention(shape, form, dtype, gradient, race, benchmark):
    b, h, n, d = shape
    kind = ("forward + backward" if gradient else "forward") + ("" if form == "plain" else f", {form}")
    benchmark.group = f"attention {kind} {shape} {dtype}".replace("torch.", "")
    todo = {name: fn for name, fn in peers(dtype).items() if right(name, fn, d, dtype, form)}
    tensors = make(*shape, dtype, form)
    do = torch.randn_like(tensors[0])
    if gradient:
        todo = {name: lambda fn=fn: gradients(fn, tensors, form, do) for name, fn in todo.items()}
    else:
        todo = {name: lambda fn=fn: fn(*tensors, form=form) for name, fn in todo.items()}
    amount = work.attention(b, h, n, d, do.element_size(), gradient, form == "bias")
    with torch.set_grad_enabled(gradient):
        race(todo, amount, rounds=5 if n > 100_000 else 15)
