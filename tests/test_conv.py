"""conv3d and upsample_conv3d: values, gradients, which form runs when."""

import pytest
import torch
import torch.nn.functional as F
from memory import peak_bytes

from t2ct.models.layers import Conv
from t2ct.ops import (
    conv,
    conv3d,
    conv_cpu,
    conv_gradient,
    smooth_conv,
    upsample,
    upsample_conv,
    upsample_conv3d,
    use_backend,
)
from t2ct.ops.dispatch import EMULATED, ONEDNN_HAS, native

DTYPES = (torch.float32, torch.bfloat16)
SLACK = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-4}
# (N, C, X, Y, Z), outputs: panels that are full and not, rows in eights and not, one voxel, odd sizes, two samples,
# long sums
SHAPES = (((1, 16, 4, 4, 2), 24), ((2, 34, 3, 5, 2), 13), ((1, 6, 1, 1, 1), 7), ((3, 48, 4, 3, 5), 16),
          ((1, 2, 1, 7, 1), 1), ((1, 512, 4, 2, 2), 8))


def make(shape, outputs, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    return x, torch.randn(outputs, shape[1], 3, 3, 3).to(dtype), torch.randn(outputs).to(dtype)


def error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


def doubled(x, w, b):
    return F.conv3d(F.interpolate(x, scale_factor=2.0, mode="nearest"), w, b, padding=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape,outputs", SHAPES, ids=str)
def test_compiled_kernel_matches_float64(isa, shape, outputs, dtype):
    x, w, b = make(shape, outputs, dtype)
    if conv_cpu.refusal(x):
        pytest.skip(conv_cpu.refusal(x))
    for bias in (b, None):
        exact = F.conv3d(x.double(), w.double(), None if bias is None else bias.double(), padding=1)
        bound = 2 * error(F.conv3d(x, w, bias, padding=1), exact) + SLACK[dtype] / 10
        with torch.no_grad(), use_backend("cpu"):
            y = conv3d(x, w, bias)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last_3d)
        assert error(y, exact) <= bound


def test_the_compiled_kernel_runs_where_it_should(monkeypatch):
    if not conv_cpu.fast_voxels():
        pytest.skip("the compiled kernel is preferred nowhere on this machine")
    ran = []
    monkeypatch.setitem(conv.CONV, "cpu", lambda *args: ran.append(1) or conv_cpu.conv3d(*args))
    x, w, b = make((1, 128, 4, 4, 2), 128, torch.float32)
    y = conv3d(x, w.requires_grad_(), b)
    assert not ran and y.requires_grad  # gradients are torch's
    with torch.no_grad():
        assert error(conv3d(x, w, b), y.double()) <= 1e-5 and len(ran) == 1
        conv3d(x, w[:16], b[:16])  # few weights
        conv3d(x.contiguous(), w, b)  # another memory format
        conv3d(x, w, b, stride=2)
        conv3d(x, w[:, :, :1, :1, :1].contiguous(), b, padding=0)
        many = torch.cat([x] * (conv_cpu.fast_voxels() // 32 + 1))
        conv3d(many.contiguous(memory_format=torch.channels_last_3d), w, b)  # many voxels
        with torch.autocast("cpu", torch.bfloat16):
            assert conv3d(x, w, b).dtype == torch.bfloat16
        assert len(ran) == 1 + (torch.bfloat16 in EMULATED)  # which is convolved in float32
        with use_backend("reference"):
            conv3d(x, w, b)
    assert len(ran) == 1 + (torch.bfloat16 in EMULATED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_any_number_of_threads(dtype):
    x, w, b = make((1, 64, 5, 4, 3), 40, dtype)
    if conv_cpu.refusal(x):
        pytest.skip(conv_cpu.refusal(x))
    before, results = torch.get_num_threads(), []
    try:
        with torch.no_grad(), use_backend("cpu"):
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(conv3d(x, w, b))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])


# (N, C, X, Y, Z), outputs, padding: tiles of eight along Z that are full, cut short at either end, and none; one voxel
NARROW = (((1, 16, 3, 4, 21), 1, 1), ((2, 32, 4, 3, 8), 4, (0, 1, 1)), ((1, 48, 5, 4, 11), 2, (1, 0, 0)),
          ((1, 16, 1, 1, 1), 3, 1), ((1, 64, 3, 3, 10), 1, 0), ((1, 16, 2, 7, 9), 1, 1))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape,outputs,padding", NARROW, ids=str)
def test_few_outputs_match_float64(isa, shape, outputs, padding, dtype, monkeypatch):
    ran = []
    monkeypatch.setattr(conv_cpu, "narrow", lambda *args, f=conv_cpu.narrow: ran.append(1) or f(*args))
    x, w, b = make(shape, outputs, dtype)
    for bias in (b, None):
        exact = F.conv3d(x.double(), w.double(), None if bias is None else bias.double(), padding=padding)
        bound = 2 * error(F.conv3d(x, w, bias, padding=padding), exact) + SLACK[dtype] / 10
        with torch.no_grad():
            y = conv3d(x, w, bias, padding=padding)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last_3d) and y.shape == exact.shape
        assert error(y, exact) <= bound
    assert len(ran) == 2


def test_parts_to_few_outputs_have_the_bits_of_the_whole():
    """Cut along X, as a stream cuts, and on any number of threads."""
    x, w, b = make((1, 64, 12, 9, 20), 2, torch.float32)
    with torch.no_grad():
        whole = conv3d(x, w, b)
        part = conv3d(x[:, :, 3:9], w, b, padding=(0, 1, 1))
        assert torch.equal(part, whole[:, :, 4:8])
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            assert torch.equal(conv3d(x, w, b), whole)
        finally:
            torch.set_num_threads(before)


def test_few_outputs_elsewhere_are_torchs(monkeypatch):
    def never(*_):
        raise AssertionError("the compiled kernel ran")

    monkeypatch.setattr(conv_cpu, "narrow", never)
    x, w, b = make((1, 16, 4, 4, 4), 2, torch.float32)
    assert conv3d(x, w.clone().requires_grad_(), b).requires_grad
    with torch.no_grad():
        conv3d(x, w, b, stride=2)
        conv3d(x.contiguous(), w, b)  # another memory format
        conv3d(x, w, b, padding=2)
        conv3d(x[:, :15].contiguous(memory_format=torch.channels_last_3d), w[:, :15], b)
        with use_backend("reference"):
            conv3d(x, w, b)
    with pytest.raises(AssertionError, match="ran"), torch.no_grad():
        conv3d(x, w, b)


@pytest.mark.parametrize("dtype", (torch.float64, *DTYPES), ids=str)
@pytest.mark.parametrize("memory_format", (torch.channels_last_3d, torch.contiguous_format), ids=str)
@pytest.mark.parametrize("size", ((2, 3, 2), (1, 1, 5), (4, 4, 4)), ids=str)
def test_folded_upsampling_matches_float64(size, memory_format, dtype):
    x, w, b = make((2, 6, *size), 5, dtype)
    x = x.contiguous(memory_format=memory_format)
    exact = doubled(x.double(), w.double(), b.double())
    bound = 2 * error(doubled(x, w, b), exact) + SLACK[dtype]
    y = upsample_conv._folded(x, w, b)
    assert y.is_contiguous(memory_format=memory_format) and y.dtype == dtype
    assert error(y, exact) <= bound
    assert error(upsample_conv._folded(x, w, None), doubled(x.double(), w.double(), None)) <= 1.2 * bound


def test_folding_is_for_inference():
    """Either form, the same values; gradients through the plain one equal those of the definition."""
    x, w, b = make((1, 8, 8, 8, 8), 8, torch.float64)
    with torch.no_grad():
        folded = upsample_conv3d(x, w, b)
        with use_backend("reference"):
            plain = upsample_conv3d(x, w, b)
    assert error(folded, plain) <= 1e-14
    leaves = [t.requires_grad_() for t in (x, w, b)]
    mine = torch.autograd.grad(upsample_conv3d(*leaves).square().sum(), leaves)
    theirs = torch.autograd.grad(doubled(*leaves).square().sum(), leaves)
    assert all(error(a, c) <= 1e-13 for a, c in zip(mine, theirs, strict=True))


BIG = {conv3d: ((1, 128, 4, 4, 2), 128), upsample_conv3d: ((1, 4, 16, 8, 8), 4)}  # where the fast forms run


@pytest.mark.filterwarnings("ignore")  # torch.jit warns of itself
@pytest.mark.parametrize("op", (conv3d, upsample_conv3d))
def test_what_watches_sees_torch_operators(op):
    """Compilation, tracing, meta and default devices, forward-mode gradients: no kernel behind their backs."""
    x, w, b = make(*BIG[op], torch.float32)
    with torch.no_grad():
        y = op(x, w, b)
        assert error(torch.compile(op, fullgraph=True, backend="aot_eager")(x, w, b), y.double()) <= 1e-6
        assert error(torch.jit.trace(op, (x, w, b))(x, w, b), y.double()) <= 1e-6
        assert op(*(t.to("meta") for t in (x, w, b))).shape == y.shape
        with torch.device("meta"):
            assert torch.equal(op(x, w, b), y)
        assert error(op(torch._neg_view(x), w, None), -op(x, w, None).double()) <= 1e-6
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(op(dual, w, b)).tangent is not None


def test_hooks_of_the_models_convolutions_run():
    layer, seen = Conv(4, 4), []
    layer.conv.register_forward_hook(lambda *_: seen.append(1))
    x = make((1, 4, 2, 2, 2), 4, torch.float32)[0]
    assert layer(x).shape == x.shape and layer(x, doubled="nearest").shape == (1, 4, 4, 4, 4) and len(seen) == 2


@pytest.mark.parametrize("op", (conv3d, upsample_conv3d))
def test_bad_input(op):
    x, w, b = make((1, 6, 2, 2, 2), 4, torch.float32)
    for bad in (x[0], x[:0], x.long()):
        with pytest.raises(ValueError, match=rf"{op.__name__}: x must be non-empty, floating .*, got"):
            op(bad, w, b)
    with pytest.raises(ValueError, match=r"weight must be \(O, 6, K, K, K\), got \(4, 3, 3, 3, 3\)"):
        op(x, w[:, :3], b)
    with pytest.raises(ValueError, match=r"bias must be \(4,\), got \(3,\)"):
        op(x, w, b[:3])
    with pytest.raises(ValueError, match="weight must be on cpu, got meta"):
        op(x, w.to("meta"), b)
    with pytest.raises(ValueError, match="bias must be on cpu, got meta"):
        op(x, w, b.to("meta"))
    with pytest.raises(RuntimeError, match="expected .*Float.*Double"):
        op(x, w.double(), b)
    with pytest.raises(ValueError, match=r"weight must be \(O, C, 3, 3, 3\), got \(4, 6, 1, 1, 1\)"):
        upsample_conv3d(x, w[..., :1, :1, :1], b)


def test_no_silent_fallback():
    x, w, b = make((1, 6, 2, 2, 2), 4, torch.float64)
    for op in (conv3d, upsample_conv3d):
        with torch.no_grad(), use_backend("cpu"), pytest.raises(RuntimeError, match=f"{op.__name__}: backend 'cpu' ca"):
            op(x, w, b)
    if native() is not None:
        x, w, b = make((1, 5, 2, 2, 2), 4, torch.bfloat16)
        with torch.no_grad(), use_backend("cpu"), pytest.raises(RuntimeError, match="bfloat16 wants"):
            conv3d(x, w, b)


# C, O, (X, Y, Z), planes of a tile: odd and thin sizes, tiles that end short, one tile
SMOOTH = ((16, 16, (2, 3, 4), 2), (6, 32, (6, 7, 3), 4), (32, 16, (9, 4, 5), 4), (48, 48, (5, 2, 2), 10))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c,o,size,planes", SMOOTH, ids=str)
def test_smoothed_doubling_matches_float64(isa, c, o, size, planes, dtype):
    """Faces, edges and corners included, where bfloat16 is rounded once more; tiles have the bits of the whole."""
    x, w, b = make((1, c, *size), o, dtype)
    for bias in (b, None):
        exact = F.interpolate(x.double(), scale_factor=2.0, mode="trilinear")
        exact = F.conv3d(exact, w.double(), None if bias is None else bias.double(), padding=1)
        with torch.no_grad():
            with use_backend("reference"):  # the compiled convolution takes bfloat16 on few processors
                bound = 2 * error(conv3d(upsample(x, "trilinear"), w, bias), exact) + SLACK[dtype] / 10
            y = smooth_conv.whole(x, w, bias)
            parts, before, folded = [], None, smooth_conv.prepare(w, bias)
            for start in range(0, 2 * size[0], planes):
                stop = min(start + planes, 2 * size[0])
                first, last = smooth_conv.sources(start, stop, size[0])
                part, before = smooth_conv.tile(folded, x[:, :, first:last], start, stop, size[0], before)
                parts.append(part)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last_3d)
        assert error(y, exact) <= bound
        if c % 16 == 0:  # else oneDNN takes another kernel for another size
            assert torch.equal(torch.cat(parts, 2), y)


def test_smoothed_doubling_is_for_inference_and_many_voxels(monkeypatch):
    if native() is None:
        pytest.skip("the compiled extension is not there")
    ran = []
    monkeypatch.setattr(smooth_conv, "whole", lambda *args, f=smooth_conv.whole: ran.append(1) or f(*args))
    x, w, b = make((2, 16, 12, 12, 12), 16, torch.float32)
    with torch.no_grad():
        y = upsample_conv3d(x, w, b, "trilinear")
        assert len(ran) == 2  # a sample at a time
        assert error(y, F.conv3d(upsample(x, "trilinear").double(), w.double(), b.double(), padding=1)) <= 1e-6
        upsample_conv3d(x[:, :, :4, :4, :4].contiguous(memory_format=torch.channels_last_3d), w, b, "trilinear")
        upsample_conv3d(x, w[:15], b[:15], "trilinear")
        upsample_conv3d(x.contiguous(), w, b, "trilinear")
        with use_backend("reference"):
            upsample_conv3d(x, w, b, "trilinear")
    assert upsample_conv3d(x, w.requires_grad_(), b, "trilinear").requires_grad
    assert len(ran) == 2


def test_torch_still_answers_which_dtypes_a_processor_has():
    """Under another name no dtype would count as emulated, and nobody would notice but by the time it takes."""
    for name in ONEDNN_HAS.values():
        assert isinstance(getattr(torch.ops.mkldnn, name)(), bool)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_that_a_processor_lacks_are_convolved_in_float32(dtype, monkeypatch):
    """The same function, rounded once, values and gradients; in autocast regions too."""
    for module in (conv, conv_gradient):
        monkeypatch.setattr(module, "EMULATED", frozenset({dtype}))
    x, w, b = (t.to(dtype) for t in make((2, 16, 6, 5, 7), 8, torch.float32))
    want = F.conv3d(x.float(), w.float(), b.float(), padding=1)
    assert torch.equal(conv3d(x, w, b), want.to(dtype))
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    dy = torch.randn(want.shape)
    conv3d(*leaves).backward(dy.to(dtype))
    truth = [t.double().requires_grad_() for t in (x, w, b)]
    F.conv3d(*truth, padding=1).backward(dy.to(dtype).double())
    for leaf, true in zip(leaves, truth, strict=True):
        assert leaf.grad.dtype == dtype and error(leaf.grad, true.grad) <= torch.finfo(dtype).eps
    with torch.autocast("cpu", dtype):
        y = conv3d(x.float(), w.float(), b.float())
        assert y.dtype == dtype and torch.equal(y, want.to(dtype))
        assert conv3d(x.double(), w.double(), b.double()).dtype == torch.float64


def test_the_work_of_a_smoothed_tile_is_an_upper_bound():
    """Counted by torch's allocator, and not by far: within a third for tiles of the published decoder's width."""
    c, size, planes = 128, (8, 16, 16), 4
    x, w, b = make((1, c, *size), c, torch.float32)
    with torch.no_grad():
        folded, window = smooth_conv.prepare(w, b), torch.empty(smooth_conv.window_shape(planes, size, c, c))
        (y, cells), _ = peak_bytes(lambda: smooth_conv.tile(folded, x[:, :, :3], 0, planes, size[0], None, window))
        low = x[:, :, 1:5]
        _, seen = peak_bytes(lambda: smooth_conv.tile(folded, low, planes, 2 * planes, size[0], cells, window))
    work = smooth_conv.work(planes, size, c, c, 4)
    assert work.kept == folded.cells.nbytes + cells.nbytes
    assert seen <= work.made + y.nbytes <= 1.34 * seen
    assert smooth_conv.flops(size, c, c) / (2 * 27 * 8 * c * c * 8 * 16 * 16) == pytest.approx(smooth_conv.cost(size))
