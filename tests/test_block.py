"""group_norm_silu_conv3d: values, gradients, what it keeps for them, and the chain that a residual block is."""

import pytest
import torch
import torch.nn.functional as F
from t2ct.kernels import block_plan
from torch import nn

from t2ct.models.layers import Conv, GroupNormSiLU, norm_silu_conv
from t2ct.models.unet import UNetConfig
from t2ct.models.unet_blocks import ResBlock
from t2ct.models.vae import ResBlock as VAEResBlock
from t2ct.ops import group_norm_silu_conv3d, group_norm_silu_conv3d_stats, use_backend
from t2ct.ops.dispatch import why_not

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = {t: torch.finfo(t).eps for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
# None is the automatic choice
BACKENDS = [(None, t) for t in (torch.float64, torch.float32, torch.bfloat16)]
BACKENDS += [("reference", torch.float32), ("triton", torch.float32), ("triton", torch.float16),
             ("triton", torch.bfloat16)]  # fmt: skip
each = pytest.mark.parametrize("backend,dtype", BACKENDS, ids=lambda v: str(v).removeprefix("torch."))


def make(dtype, c=8, o=12, size=(3, 4, 2), n=2):
    """x, gn_weight, gn_bias, conv_weight, conv_bias, residual, channel_bias; x far from zero mean."""
    torch.manual_seed(0)
    x, residual = torch.randn(n, c, *size) + 2, torch.randn(n, o, *size)
    tensors = (x, torch.randn(c), torch.randn(c), torch.randn(o, c, 3, 3, 3) / 10, torch.randn(o), residual,
               torch.randn(n, o))  # fmt: skip
    tensors = [t.to(DEVICE, dtype) for t in tensors]
    return [t.contiguous(memory_format=torch.channels_last_3d) if i in (0, 5) else t for i, t in enumerate(tensors)]


@pytest.fixture(params=("apply", "prologue"))
def way(request, monkeypatch):
    """How the norm reaches Triton's convolution, and its sums out of the gradient's, whatever the plan says."""
    planned = block_plan.forward

    def forced(*args):
        return request.param, planned(*args)[1]

    monkeypatch.setattr(block_plan, "forward", forced)
    monkeypatch.setattr(block_plan, "gradient", lambda *args: request.param == "prologue")
    return request.param


def op(x, gw, gb, w, b, residual, channel_bias):
    return group_norm_silu_conv3d(x, gw, gb, w, b, 4, 1e-6, residual, channel_bias=channel_bias)


def definition(x, gw, gb, w, b, residual, channel_bias):
    a = F.silu(F.group_norm(x, 4, gw, gb, 1e-6))
    return F.conv3d(a, w, b, padding=1) + residual + channel_bias[..., None, None, None]


def error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


def run(fn, tensors, dy):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = fn(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.fixture
def forced(backend, dtype):
    if backend and why_not(backend, DEVICE, dtype):
        pytest.skip(why_not(backend, DEVICE, dtype))
    with use_backend(backend):
        yield


@each
def test_matches_float64(forced, way, dtype):
    tensors = make(dtype)
    dy = torch.randn_like(tensors[5])
    exact = run(definition, [t.double() for t in tensors], dy)
    eager = run(definition, tensors, dy)
    mine = run(op, tensors, dy)
    for ours, theirs, truth in zip(mine, eager, exact, strict=True):
        assert ours.dtype == dtype and error(ours, truth) <= 2 * error(theirs, truth) + 8 * EPS[dtype]
    with torch.no_grad():
        assert error(op(*tensors), mine[0].double()) <= 2 * EPS[dtype]


@pytest.mark.skipif(bool(why_not("triton", DEVICE, torch.float16)), reason="no Triton here")
def test_same_bits_twice(way):
    tensors = make(torch.float16)
    dy = torch.randn_like(tensors[5])
    with use_backend("triton"):
        first, second = run(op, tensors, dy), run(op, tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradcheck():
    tensors = [t.requires_grad_() for t in make(torch.float64, 4, 3, (2, 1, 2), 1)]
    assert torch.autograd.gradcheck(op, tensors)


def test_only_the_gradients_that_are_wanted():
    tensors = make(torch.float32)
    for wanted in range(7):
        leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        op(*leaves).square().sum().backward()
        assert [t.grad is not None for t in leaves] == [i == wanted for i in range(7)]


@each
def test_chain_of_statistics(forced, way, backend, dtype):
    """What the first convolution says of its result is what GroupNorm would compute, and the second gives the same."""
    x, gw, gb, w, b, _, channel_bias = make(dtype, 8, 8)
    y, stats = group_norm_silu_conv3d_stats(x, gw, gb, w, b, 4, channel_bias=channel_bias, next_groups=2)
    assert (stats is not None) == (backend == "triton")
    if stats is not None:
        groups = y.double().reshape(2, 2, -1)
        tolerance = 1e-6 if DEVICE == "cuda" or dtype != torch.bfloat16 else 1e-2  # interpreted, y is rounded later
        assert error(stats[0], groups.mean(2)) <= tolerance
        assert error(stats[1], (groups.var(2, correction=0) + 1e-6).rsqrt()) <= tolerance
    z, _ = group_norm_silu_conv3d_stats(y, gw, gb, w, b, 2, stats=stats)
    assert error(z, group_norm_silu_conv3d(y, gw, gb, w, b, 2).double()) <= 4 * EPS[dtype]


@each
def test_overwriting(forced, way, backend, dtype):
    """Without a gradient the activated tensor, where there is one, takes x's place; with one x stays as it is."""
    x, gw, gb, w, b, _, _ = make(dtype)
    a = F.silu(F.group_norm(x.double(), 4, gw.double(), gb.double(), 1e-6))
    exact = F.conv3d(a, w.double(), b.double(), padding=1)
    mine = x.clone()
    y, _ = group_norm_silu_conv3d_stats(mine, gw, gb, w, b, 4, overwrite=True)
    written = (backend, way) != ("triton", "prologue")
    assert error(y, exact) <= 8 * EPS[dtype] and torch.equal(mine, x) != written
    mine = x.clone().requires_grad_()
    y, _ = group_norm_silu_conv3d_stats(mine, gw, gb, w, b, 4, overwrite=True)
    assert error(y.detach(), exact) <= 8 * EPS[dtype] and torch.equal(mine, x)


def saved_bytes(fn):
    """Bytes of the distinct memory that the graph of fn() keeps, parameters apart."""
    kept = {}

    def pack(t):
        if not isinstance(t, nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = fn()
    assert y.requires_grad
    return sum(kept.values())


class Eager(nn.Module):
    """The same residual block in plain torch."""

    def __init__(self, c, groups):
        super().__init__()
        self.layers = nn.Sequential(nn.GroupNorm(groups, c), nn.SiLU(), nn.Conv3d(c, c, 3, padding=1),
                                    nn.GroupNorm(groups, c), nn.SiLU(), nn.Conv3d(c, c, 3, padding=1))  # fmt: skip

    def forward(self, x):
        return x + self.layers(x)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", ("vae", "unet"))
def test_a_residual_block_keeps_half_of_eager(kind, dtype):
    x = torch.randn(1, 32, 12, 12, 12, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    if kind == "vae":
        block = VAEResBlock(32, 32, 8, 1e-6).to(dtype)
        mine = saved_bytes(lambda: block(x))
    else:
        block = ResBlock(UNetConfig((32,), (False,), norm_groups=8), 32, 32, 16).to(dtype)
        mine = saved_bytes(lambda: block(x, torch.randn(1, 16, dtype=dtype)))
    eager = saved_bytes(lambda: Eager(32, 8).to(dtype)(x))
    assert mine <= 0.5 * eager
    assert mine >= 2 * x.nbytes  # the input of each norm is kept: less would mean that the count is wrong


def test_under_autocast():
    """As torch's own: the convolution in bfloat16, the norm in float32, gradients in the parameters' dtype."""
    x, gw, gb, w, b, _, _ = make(torch.float32)
    leaves = [t.requires_grad_() for t in (x, gw, gb, w, b)]
    with torch.autocast(DEVICE, torch.bfloat16):
        y = group_norm_silu_conv3d(*leaves, 4)
    assert y.dtype == torch.bfloat16
    a = F.silu(F.group_norm(x.double(), 4, gw.double(), gb.double(), 1e-6))
    exact = F.conv3d(a, w.double(), b.double(), padding=1)
    assert error(y, exact) <= 4 * EPS[torch.bfloat16]
    gradients = torch.autograd.grad(y.float().square().sum(), leaves)
    wanted = torch.autograd.grad(exact.square().sum(), leaves)
    for mine, theirs in zip(gradients, wanted, strict=True):
        assert mine.dtype == torch.float32 and error(mine, theirs.double()) <= 8 * EPS[torch.bfloat16]


def test_compiled_whole():
    tensors = make(torch.float32)
    with torch.no_grad():
        y = torch.compile(op, fullgraph=True, backend="aot_eager")(*tensors)
    assert error(y, op(*tensors).double()) <= 1e-6


def test_hooked_and_replaced_modules_are_called():
    norm, conv, shift = GroupNormSiLU(2, 4).to(DEVICE), Conv(4, 4).to(DEVICE), torch.ones(2, 4, device=DEVICE)
    x = make(torch.float32, 4)[0]
    plain, _ = norm_silu_conv(norm, conv, x, residual=x, channel_bias=shift)
    for module in (norm, conv, conv.conv):
        seen = []
        handle = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        hooked, _ = norm_silu_conv(norm, conv, x, residual=x, channel_bias=shift)
        handle.remove()
        assert seen == [1] and error(hooked, plain.double()) <= 1e-6
    doubled = nn.Conv3d(4, 4, 1).to(DEVICE)  # what a quantiser or an adapter may put in a convolution's place
    conv.forward = lambda x: doubled(x)
    conv.conv = doubled
    assert torch.equal(norm_silu_conv(norm, conv, x)[0], doubled(norm(x)))


def test_bad_input():
    x, gw, gb, w, b, residual, channel_bias = make(torch.float32)
    name = "group_norm_silu_conv3d: "
    with pytest.raises(ValueError, match=name + "x must be non-empty, .* C a multiple of groups=3"):
        group_norm_silu_conv3d(x, gw, gb, w, b, 3)
    with pytest.raises(ValueError, match=name + r"weight must be \(8,\) on .*, got \(7,\)"):
        group_norm_silu_conv3d(x, gw[:7], gb, w, b, 4)
    with pytest.raises(ValueError, match=name + r"weight must be \(O, 8, K, K, K\), got"):
        group_norm_silu_conv3d(x, gw, gb, w[:, :4], b, 4)
    with pytest.raises(ValueError, match=name + r"conv_weight must be \(O, C, 3, 3, 3\), got \(12, 8, 1, 1, 1\)"):
        group_norm_silu_conv3d(x, gw, gb, w[..., :1, :1, :1], b, 4)
    with pytest.raises(ValueError, match=name + r"channel_bias must be \(2, 12\), got \(12,\)"):
        group_norm_silu_conv3d(x, gw, gb, w, b, 4, channel_bias=b)
    with pytest.raises(ValueError, match=name + r"residual must be \(2, 12, 3, 4, 2\), got"):
        group_norm_silu_conv3d(x, gw, gb, w, b, 4, 1e-6, residual[:1])
