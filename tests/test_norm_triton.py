"""What the Triton norm kernels have beside test_ops.py's grid: statistics of tiles and their merging, many tiles."""

import pytest
import torch
import torch.nn.functional as F

from t2ct.ops import group_apply, group_norm, group_norm_silu, group_stats, merge_partials, merge_stats, use_backend

pytest.importorskip("triton")

from t2ct.kernels import norm, norm_backward  # noqa: E402  needs triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ids = {"ids": lambda v: str(v).removeprefix("torch.")}


@pytest.fixture(autouse=True)
def triton_backend():
    torch.manual_seed(0)
    with use_backend("triton"):
        yield


def last(x):
    return x.to(DEVICE).contiguous(memory_format=torch.channels_last_3d)


def split(x, sizes):
    """The definition of partial statistics: tiles of consecutive voxels, in float64 and then float32."""
    parts = x.double().flatten(2).split(sizes, 2)
    mean = torch.stack([p.mean(2) for p in parts], 1)
    m2 = torch.stack([p.var(2, correction=0) * p.shape[2] for p in parts], 1)
    return mean.float(), m2.float(), torch.tensor([p.shape[2] for p in parts], device=x.device).float()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), **ids)
@pytest.mark.parametrize("shape,block", (((2, 21, 4, 3, 5), 25), ((1, 130, 3, 2, 1), 4), ((1, 1, 1, 1, 1), 7)), **ids)
def test_partial_statistics(shape, block, dtype, monkeypatch):
    x = last((torch.randn(shape) + 30).to(dtype))
    for elements in (norm.HELD["stats"][0], 8 * norm.channel_block(shape[1])):  # at once, and in steps of 8 voxels
        monkeypatch.setattr(norm, "INTERPRETED", False)
        monkeypatch.setitem(norm.HELD, "stats", (elements, 4))
        mean, m2, count = norm.partial_stats(x, block)
        wanted = split(x, block)
        assert torch.equal(count, wanted[2])
        assert ((mean - wanted[0]).abs() <= 4e-6 * wanted[0].abs()).all()
        assert ((m2 - wanted[1]).abs() <= 1e-5 * wanted[1] + 1e-8).all()


@pytest.mark.parametrize("groups", (1, 3, 12))
@pytest.mark.parametrize("tiles", (7, 9000))
def test_merging_keeps_digits(groups, tiles, monkeypatch):
    """A mean a thousand times the deviation; 9000 tiles are folded first. Tiles without voxels may hold anything."""
    monkeypatch.setattr(norm, "FOLDED", 40)
    x = (torch.randn(2, 12, tiles, 3, device=DEVICE) + 1000).double()
    mean, m2 = x.mean(3).float(), (x.var(3, correction=0) * 3).float()
    mean, m2 = mean.transpose(1, 2).contiguous(), m2.transpose(1, 2).contiguous()
    count = torch.full((tiles,), 3.0, device=DEVICE)
    count[3] = 0
    mean[:, 3], m2[:, 3] = torch.nan, torch.inf
    x = x[:, :, torch.arange(tiles) != 3].reshape(2, groups, -1)
    ours, rstd, ours64, m2_64 = norm._merge(mean, m2, count, groups, 1e-6)
    variance = x.var(2, correction=0)
    assert torch.equal(ours, ours64.float())
    assert ((ours64 - x.mean(2)).abs() <= 3.1e-5).all()  # half an ulp at 1000: the tiles' own means carry 24 bits
    assert ((m2_64 / x.shape[2] / variance - 1).abs() <= 3e-5).all()
    assert ((rstd / (variance + 1e-6).rsqrt() - 1).abs() <= 3e-5).all()
    with use_backend("reference"):
        for one, other in zip((ours, rstd), merge_partials(mean, m2, count, groups), strict=True):
            assert ((one / other - 1).abs() <= 2e-7).all()


def test_statistics_keep_their_digits():
    """As test_ops.py asks of the compiled kernels; outliers where the guess about the mean is taken, and elsewhere."""
    x = last(torch.randn(2, 24, 20, 21, 22) + 1000)
    mean, m2, count = group_stats(x, 8)
    exact = x.double().reshape(2, 8, -1)
    assert count == exact.shape[2] and mean.dtype == m2.dtype == torch.float64
    assert ((mean - exact.mean(2)).abs() <= 1e-7 * 1000).all()
    assert ((m2 / count / exact.var(2, correction=0) - 1).abs() <= 1e-5).all()
    for voxel in (0, 1, 728):
        x = torch.randn(1, 32, 729)
        x[0, :, voxel] = 1e4
        mean, m2, count = group_stats(last(x.view(1, 32, 9, 9, 9)), 32)
        variance = x.double().var(2, correction=0).to(DEVICE)
        assert ((m2 / count / variance - 1).abs() <= 1e-5).all()
        assert ((mean - x.double().mean(2).to(DEVICE)).abs() <= 1e-6 * variance.sqrt()).all()
    mean, m2, _ = group_stats(last(torch.full((1, 16, 5, 5, 5), 0.1)), 4)
    assert (m2 == 0).all() and ((mean - 0.1).abs() <= 1e-8).all()


def error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), **ids)
@pytest.mark.parametrize("silu", (True, False))
def test_many_small_tiles(dtype, silu, monkeypatch):
    """Every loop turns, every edge is met, channels are split into blocks; the answer is the definition's."""

    def small(c, elements, voxels):
        return 8, 32

    for module in (norm, norm_backward):
        monkeypatch.setattr(module, "tile", small)
    monkeypatch.setattr(norm, "PROGRAMS", 12)
    monkeypatch.setattr(norm_backward, "TILES", 2)
    x, w, b = 3 * torch.randn(2, 60, 5, 4, 3) + 5, torch.randn(60), torch.randn(60)
    x, w, b = last(x.to(dtype)), w.to(DEVICE, dtype), b.to(DEVICE, dtype)
    dy = last(torch.randn_like(x))

    def run(op, x, w, b, dy):
        leaves = [t.detach().requires_grad_() for t in (x, w, b)]
        y = op(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    def definition(x, w, b):
        z = F.group_norm(x, 3, w, b, 1e-6)
        return F.silu(z) if silu else z

    mine = run(lambda *t: (group_norm_silu if silu else group_norm)(*t, 3), x, w, b, dy)
    exact = run(definition, *(t.double() for t in (x, w, b)), dy)
    eager = run(definition, x, w, b, dy)
    for ours, theirs, truth in zip(mine, eager, exact, strict=True):
        assert error(ours, truth) <= 2 * error(theirs, truth) + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("tiles", (3, 50))
def test_gradient_from_sums(tiles, monkeypatch):
    """The sums of dz and dz * xhat in tiles of any number, 50 folded first, are as good as the pass that makes them."""
    monkeypatch.setattr(norm_backward, "MOST_TILES", 20)
    monkeypatch.setattr(norm_backward, "FOLDED", 7)
    x, w, b, dz = torch.randn(2, 12, 5, 5, 2) + 3, torch.randn(12), torch.randn(12), torch.randn(2, 12, 5, 5, 2)
    x, w, b, dz = last(x), w.to(DEVICE), b.to(DEVICE), last(dz)
    m2, mean = torch.var_mean(x.reshape(2, 4, -1), dim=2, correction=0)
    rstd = (m2 + 1e-6).rsqrt()
    wide_mean, wide_rstd = (t.repeat_interleave(3, 1)[..., None, None, None] for t in (mean, rstd))
    xhat = (x - wide_mean) * wide_rstd
    parts = (t.flatten(2).tensor_split(tiles, 2) for t in (dz, dz * xhat))
    sums = torch.stack([torch.stack([p.sum(2) for p in part], 1) for part in parts], 2)
    leaves = [t.double().requires_grad_() for t in (x, w, b)]
    exact = torch.autograd.grad(F.group_norm(leaves[0], 4, leaves[1], leaves[2], 1e-6), leaves, dz.double())
    mine = norm_backward.from_sums(dz, x, w, b, mean, rstd, sums.contiguous(), 4)
    for ours, truth in zip(mine, exact, strict=True):
        assert error(ours, truth) <= 4e-6


def test_parameters_of_any_floating_dtype():
    x = last(torch.randn(1, 6, 3, 2, 2))
    exact = F.group_norm(x.double(), 2, torch.full((6,), 0.5, device=DEVICE).double(), None, 1e-6)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        w, b = torch.full((12,), 0.5, dtype=dtype, device=DEVICE)[::2], torch.zeros(6, dtype=dtype, device=DEVICE)
        leaves = [t.requires_grad_() for t in (x.detach(), w.detach(), b)]
        y = group_norm(*leaves, 2)
        assert error(y.detach(), exact) <= 1e-6
        assert [g.dtype for g in torch.autograd.grad(y.sum(), leaves)] == [x.dtype, dtype, dtype]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), **ids)
@pytest.mark.parametrize("silu", (False, True))
def test_slabs_equal_the_whole(dtype, silu):
    x, w, b = 2 * torch.randn(1, 12, 13, 6, 5) + 3, torch.randn(12), torch.randn(12)
    x, w, b = last(x.to(dtype)), w.to(DEVICE), b.to(DEVICE)
    slabs = x.split(4, dim=2)
    mean, m2, count = merge_stats(*(group_stats(slab, 4) for slab in slabs))
    rstd = (m2 / count + 1e-6).rsqrt()
    expected = (group_norm_silu if silu else group_norm)(x, w, b, 4)
    for slab in slabs:  # in place, in x itself
        assert group_apply(slab, mean, rstd, w, b, 4, silu, out=slab) is slab
    assert error(x, expected.double()) <= 2 * torch.finfo(dtype).eps


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # numpy's, of the interpreter
def test_silu_in_float32():
    """4 ulp; below zero 2 |x| more, because the argument of exp2 is rounded."""
    x = torch.cat([torch.linspace(-87, 120, 100_003), torch.logspace(-30, 0, 1000), -torch.logspace(-30, 0, 1000)])
    one = torch.ones(1, 1, device=DEVICE)
    y = group_apply(last(x.view(1, 1, 1, 1, -1)), 0 * one, one, one[0], 0 * one[0], 1, True).flatten().cpu()
    exact = F.silu(x.double())
    ulp = torch.finfo(torch.float32).eps * torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(1e-37))))
    assert ((y.double() - exact).abs() <= (4 + 2 * (-x).clamp_min(0)) * ulp).all()
    far = torch.tensor([-88.0, -1e4, -0.0, 1e30, torch.nan])
    far = group_apply(last(far.view(1, 1, 1, 1, -1)), 0 * one, one, one[0], 0 * one[0], 1, True).flatten().cpu()
    assert (far[:2].abs() <= 1e-33).all() and far[2] == 0 and far[3] == 1e30 and far[4].isnan()


def test_programs_fill_the_chip():
    """Hundreds of programs for any volume of some size, and never so many tiles that merging them takes long."""
    for n, c, side in ((1, 64, 64), (1, 512, 32), (2, 128, 128), (1, 64, 512), (1, 1, 512)):
        bs, bc = 8192 // norm.channel_block(c), norm.channel_block(c)
        tiles = -(-(side**3) // norm.tile_voxels(n, side**3, c, bs, bc))
        programs = n * tiles * -(-c // bc)
        assert min(n * c * side**3 // 8192, 1000) <= programs <= norm.PROGRAMS
        assert tiles <= norm.MOST_TILES


@pytest.mark.gpu
def test_beyond_32_bits():
    x = torch.zeros(1, 64, 513, 256, 256, device="cuda", dtype=torch.float16)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    x[:, :, -1] = last(torch.randn(1, 64, 256, 256).half()[:, :, None])[:, :, 0]
    tail = x[:, :, -1].double().reshape(32, -1)
    mean, m2, count = group_stats(x, 32)
    assert ((mean[0] * count - tail.sum(1)).abs() <= 1e-3 * tail.abs().sum(1)).all()
    assert ((m2[0] / (tail.square().sum(1) - count * mean[0] ** 2) - 1).abs() <= 1e-5).all()
    one = torch.ones(64, device="cuda")
    y = group_apply(x, mean, (m2 / count).rsqrt(), one, 0 * one, 32, out=x)
    assert (y[:, :, -1].float().std() > 1) and torch.equal(y[:, :, 0], y[:, :, 1])
