"""The gradients of kernels/conv.py: of x by its own kernel, of the weights by a product over all voxels.

The weight gradient is split over boxes of voxels, whose parts are added in their order: same input, same bits.
"""

import torch
import triton
import triton.language as tl
from t2ct.kernels import fold, resample
from t2ct.kernels.conv import INTERPRET, SIZES, _boxes, _conv, _row
from t2ct.kernels.plan import POINTER, box, launch, splits_of
from torch import Tensor


@triton.jit
def weight_gradient_kernel(
    x, dy, partial,
    N, D, H, W, C, YD, YH, YW, O, tiles_d, tiles_h, tiles_w, splits,
    K: tl.constexpr, S: tl.constexpr, PAD0: tl.constexpr, PAD1: tl.constexpr, PHASES: tl.constexpr,
    TD: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sums of dy[row] x[row + tap] over every splits-th box, into partial (splits, PHASES, O, K^3, C) float32.

    dy (N, YD, YH, YW, O), x (N, D, H, W, C); a program holds BO x BC numbers of one phase and tap.
    """
    OS: tl.constexpr = 2 if PHASES == 8 else 1
    o_blocks, c_blocks = tl.cdiv(O, BO), tl.cdiv(C, BC)
    pid = tl.program_id(0)
    o = pid % o_blocks * BO + tl.arange(0, BO)
    c = pid // o_blocks % c_blocks * BC + tl.arange(0, BC)
    tap = pid // (o_blocks * c_blocks) % (K * K * K)
    phase = pid // (o_blocks * c_blocks) // (K * K * K)
    split = tl.program_id(1)
    kd, kh, kw = tap // (K * K), tap // K % K, tap % K
    pa, pb, pc = phase // 4, phase // 2 % 2, phase % 2
    pad_d, pad_h, pad_w = PAD0 + (PAD1 - PAD0) * pa, PAD0 + (PAD1 - PAD0) * pb, PAD0 + (PAD1 - PAD0) * pc
    tiles = tiles_d * tiles_h * tiles_w
    acc = tl.zeros((BO, BC), tl.float32)
    for t in range(split, N * tiles, splits):
        sample = (t // tiles).to(tl.int64)
        d0, h0, w0, rd, rh, rw = _row(t % tiles, tiles_h, tiles_w, TD, TH, TW)
        yd, yh, yw = (d0 + rd) * OS + pa, (h0 + rh) * OS + pb, (w0 + rw) * OS + pc
        valid = (yd < YD) & (yh < YH) & (yw < YW)
        first = ((sample * YD + d0 * OS + pa) * YH + h0 * OS + pb) * YW + w0 * OS + pc
        within = ((rd * OS * YH + rh * OS) * YW + rw * OS) * O
        g = tl.load(dy + first * O + within[None, :] + o[:, None], mask=valid[None, :] & (o < O)[:, None], other=0.0)
        xd0, xh0, xw0 = d0 * S - pad_d + kd, h0 * S - pad_h + kh, w0 * S - pad_w + kw
        xd, xh, xw = xd0 + rd * S, xh0 + rh * S, xw0 + rw * S
        ok = valid & (xd >= 0) & (xd < D) & (xh >= 0) & (xh < H) & (xw >= 0) & (xw < W)
        start = (((sample * D + xd0) * H + xh0) * W + xw0) * C
        rows = ((rd * S * H + rh * S) * W + rw * S) * C
        a = tl.load(x + start + rows[:, None] + c[None, :], mask=ok[:, None] & (c < C)[None, :], other=0.0)
        if INTERPRET:
            a, g = a.to(tl.float32), g.to(tl.float32)
        acc = tl.dot(g, a, acc, input_precision="ieee")
    row = ((split * PHASES + phase).to(tl.int64) * O + o[:, None]) * (K * K * K) + tap
    tl.store(partial + row * C + c[None, :], acc, mask=(o < O)[:, None] & (c < C)[None, :])


def _weight_gradient(
    x: Tensor, dy: Tensor, k: int, stride: int = 1, pads: tuple[int, int] = (1, 1), phases: int = 1
) -> Tensor:
    """(phases, O, K^3, C) float32: sums over boxes, split among programs, then over the splits in their order."""
    n, c, *spatial = x.shape
    o, size = dy.shape[1], dy.shape[2:]
    at = launch(x.device, x.dtype, c, o, gradient=True)
    dims, tiles = _boxes(x, o, size, phases, stride, at.bk)
    programs = phases * k**3 * triton.cdiv(o, at.bm) * triton.cdiv(c, at.bn)
    splits = splits_of(programs, n * tiles[0] * tiles[1] * tiles[2])
    partial = torch.empty(splits, phases, o, k**3, c, device=x.device)
    weight_gradient_kernel[(programs, splits)](
        x, dy, partial, n, *spatial, c, *size, o, *tiles, splits,
        K=k, S=stride, PAD0=pads[0], PAD1=pads[1], PHASES=phases,
        TD=dims[0], TH=dims[1], TW=dims[2], BO=at.bm, BC=at.bn, num_warps=at.warps, num_stages=at.stages,
    )  # fmt: skip
    return partial.sum(0)


def conv3d_backward(dy, x, weight, stride, padding, wanted=(True, True)):
    """(dx or None, dweight or None) of conv3d; dy and x channels-last, dweight in weight's dtype."""
    k = weight.shape[2]
    dx = dw = None
    if wanted[0] and stride == 1:
        turned = fold.taps_last(fold.turned(weight))
        dx, _ = _conv(dy, turned, x.shape[2:], k, 1, (k - 1 - padding,) * 2)
    elif wanted[0]:
        matrix, pads = fold.stride_gradient(padding), (1 - padding // 2, 1 - (1 + padding) // 2)
        dx, _ = _conv(dy, fold.fold(weight.transpose(0, 1), matrix), x.shape[2:], 2, 1, pads)
    if wanted[1]:
        dw = _weight_gradient(x, dy, k, stride, (padding, padding))
        dw = dw.view(len(weight), k, k, k, -1).permute(0, 4, 1, 2, 3).to(weight.dtype)
    return dx, dw


def conv3d_backward_norm_silu(dy, x, weight, padding, mean, rstd, gn_weight, gn_bias, groups):
    """(dz like x, sums (N, tiles, 2, C) float32) of conv3d(silu(z)), stride 1, z = GroupNorm(x) of statistics float32
    (N, groups): the gradient of z in dy's dtype, and per tile and channel its sum and its sum with the normalised x."""
    k = weight.shape[2]
    norm = (mean, rstd, gn_weight, gn_bias, groups)
    turned = fold.taps_last(fold.turned(weight))
    dz, parts = _conv(dy, turned, x.shape[2:], k, 1, (k - 1 - padding,) * 2, norm=norm, behind=x)
    return dz, parts[0]


def upsample_conv3d_backward(dy, x, weight, mode="nearest", wanted=(True, True)):
    """(dx or None, dweight or None) of upsample_conv3d. Trilinear goes through the doubled volume: where its weights
    are folded they differ at the border."""
    dx = dw = None
    if mode == "trilinear":
        up = resample.upsample(x, "trilinear") if wanted[1] else dy
        d_up, dw = conv3d_backward(dy, up, weight, 1, 1, wanted)
        return None if d_up is None else resample.upsample_backward(d_up, "trilinear"), dw
    if wanted[0]:
        w = fold.fold(weight.transpose(0, 1), fold.NEAREST_GRADIENT)
        dx, _ = _conv(dy, w, x.shape[2:], 4, 2)
    if wanted[1]:
        dw = fold.unfold(_weight_gradient(x, dy, 2, 1, (1, 0), 8), fold.NEAREST).to(weight.dtype)
    return dx, dw


def launches(arch: int, dtype: torch.dtype = torch.float16):
    """What benchmarks/aot.py compiles, by way of kernels/conv.py."""
    ints = dict.fromkeys((*"NDHWCO", "YD", "YH", "YW", "tiles_d", "tiles_h", "tiles_w", "splits"), "i32")
    for c, o in SIZES:
        at = launch(arch, dtype, c, o, gradient=True)
        dims = dict(zip(("TD", "TH", "TW"), box((64, 64, 64), at.bk), strict=True))
        yield {
            "name": f"weight gradient, {c} to {o}",
            "kernel": weight_gradient_kernel,
            "signature": {"x": POINTER[dtype], "dy": POINTER[dtype], "partial": "*fp32"} | ints,
            "constexprs": {"K": 3, "S": 1, "PAD0": 1, "PAD1": 1, "PHASES": 1, **dims, "BO": at.bm, "BC": at.bn},
            "num_warps": at.warps,
            "num_stages": at.stages,
            "divisible": ["C", "O", "x", "dy", "partial"],
        }
