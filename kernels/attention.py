"""Flash attention for the tokens of a volume: softmax(scale q k^T + bias) v without storing queries x keys.

q (B, H, N, D), k and v (B, H, M, D), any strides with a last one of 1; D up to 128, padded to a power of two in
registers. The logits may carry an additive bias (any of its four strides may be 0), a bias by the offset of two tokens
on a grid, a causal mask; queries and keys may be brought to unit length and rescaled on their way in.

forward_kernel   online softmax over blocks of keys; blocks that reach over an edge or the diagonal are a second loop
cross_kernel     keys fit one block (a text, the frames of a scan): loaded once, no rescaling, rows of queries stream by

Softmax is base 2 with the scale folded into one FMA per logit. `lse` is the base-2 logsumexp of each row, +inf where
no key is allowed, so that 2^(logit - lse) is 0 there and nothing is NaN. Offsets are int64 per tile, int32 within it.
No atomics: same input, same bits. Sources: Milakov and Gimelshein 2018; Dao 2023 (FlashAttention-2);
FlashAttention-4 (lazy rescaling, exponentials on the FMA units).
"""

import torch
import triton
import triton.language as tl
from t2ct.kernels.attention_plan import MAX_ONE_BLOCK, config
from t2ct.kernels.plan import POINTER, architecture, power, stored
from torch import Tensor

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)  # whose bfloat16 products are wrong
LOG2E = tl.constexpr(1.4426950408889634)
MASKED = tl.constexpr(-1e30)  # the first running maximum: finite, so that -inf - maximum is never NaN
LAZY_GROWTH = tl.constexpr(8.0)  # lazy rescaling: powers of two by which a row may outgrow its maximum (p up to 256)
EPS = tl.constexpr(1e-12)  # of F.normalize


@triton.jit
def tile(x, start, stride, rows, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CHECK: tl.constexpr):
    """R rows from `start` of a matrix (rows, D) with unit last stride, (R, BD), zeros outside."""
    r, d = tl.arange(0, R), tl.arange(0, BD)
    at = x + tl.cast(start, tl.int64) * stride + (r[:, None] * stride + d[None, :])
    if CHECK:
        y = tl.load(at, mask=(start + r < rows)[:, None] & (d < D)[None, :], other=0.0)
    elif D < BD:
        y = tl.load(at, mask=(d < D)[None, :], other=0.0)
    else:
        y = tl.load(at)
    if INTERPRET and x.dtype.element_ty == tl.bfloat16:
        y = y.to(tl.float32)
    return y


@triton.jit
def put(x, y, start, stride, rows, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Stores (R, BD) where `tile` would load it."""
    r, d = tl.arange(0, R), tl.arange(0, BD)
    at = x + tl.cast(start, tl.int64) * stride + (r[:, None] * stride + d[None, :])
    tl.store(at, y.to(x.dtype.element_ty), mask=(start + r < rows)[:, None] & (d < D)[None, :])


@triton.jit
def vector(x, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    return tl.load(x + d, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def unit(x, weight):
    """F.normalize of the rows of x times weight, in x's dtype."""
    y = x.to(tl.float32)
    r = 1.0 / tl.maximum(tl.sqrt(tl.sum(y * y, 1)), EPS)
    return (y * r[:, None] * weight[None, :]).to(x.dtype)


@triton.jit
def unit_gradient(x, weight, g):
    """Gradients of `unit`: of the rows x, and each row's share of weight's (R, BD). g is the result's, float32."""
    y = x.to(tl.float32)
    norm = tl.sqrt(tl.sum(y * y, 1))
    r = 1.0 / tl.maximum(norm, EPS)
    y = y * r[:, None]
    gw = g * weight[None, :]
    along = tl.where(norm > EPS, tl.sum(gw * y, 1), 0.0)  # below eps F.normalize divides by a constant
    return (gw - y * along[:, None]) * r[:, None], g * y


@triton.jit
def logits(
    x, y, i0, j0, N, M, scale, bias, b_n, b_m, table, width,
    BM: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    BIAS: tl.constexpr, RELATIVE: tl.constexpr, PRECISION: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Products of queries x and keys y plus the biases over scale: (BM, BN), or (BN, BM) if TURNED; masked.

    The biases are what the products are added to, so what was loaded takes the layout of the matrix unit at once.
    Added afterwards they drag the softmax into theirs (sm_80, D=32: 62 instructions a logit, not 12).
    """
    i, j = i0 + tl.arange(0, BM), j0 + tl.arange(0, BN)
    i, j = (i[None, :], j[:, None]) if TURNED else (i[:, None], j[None, :])
    if TURNED:
        left, right = y, x.T
    else:
        left, right = x, y.T
    if BIAS or RELATIVE:
        inside = i + 0 * j < N
        if MASK or TURNED:  # blocks of keys without a mask end before M, unless they are the rows
            inside = inside & (j < M)
        start = tl.zeros((left.shape[0], right.shape[1]), tl.float32)
        if BIAS:
            first = bias + tl.cast(i0, tl.int64) * b_n + tl.cast(j0, tl.int64) * b_m
            b = tl.load(first + ((i - i0) * b_n + (j - j0) * b_m), mask=inside, other=0.0)
            start += b.to(tl.float32)
        if RELATIVE:
            line = 2 * width - 1
            of_i, of_j = i // width * line + i % width, j // width * line + j % width
            centre = (N // width - 1) * line + width - 1
            start += tl.load(table + (of_i - of_j + centre), mask=inside, other=0.0).to(tl.float32)
        s = tl.dot(left, right, start * (1.0 / scale), input_precision=PRECISION)
    else:
        s = tl.dot(left, right, input_precision=PRECISION)
    if MASK:
        ok = j < M
        if CAUSAL:
            ok = ok & (j <= i)
        s = tl.where(ok, s, float("-inf"))
    return s


@triton.jit
def polynomial_exp2(x):
    """2^x for x <= 0 on the FMA units, relative error 2.6e-6; 0 where 2^x is below the smallest normal number."""
    y = tl.maximum(x, -127.0)
    shifted = y + 12582912.0  # 1.5 * 2^23: the addition rounds y to a whole number, left in the low bits
    f = y - (shifted - 12582912.0)
    p = tl.fma(f, 0.009570098967856544, 0.05591786008841152)
    p = tl.fma(tl.fma(tl.fma(p, f, 0.2402474490054794), f, 0.6931218147797653), f, 0.9999992614238321)
    whole = shifted.to(tl.int32, bitcast=True) << 23  # adds to the exponent of p; the rounding constant shifts out
    return tl.where(x > -126.0, (p.to(tl.int32, bitcast=True) + whole).to(tl.float32, bitcast=True), 0.0)


@triton.jit
def exponentials(x, SPLIT: tl.constexpr):
    """2^x (R, C), one column of each 2^SPLIT by the polynomial, so that the special-function unit has fewer."""
    if SPLIT == 0:
        return tl.exp2(x)
    else:
        a, b = tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))
        if SPLIT == 1:
            a = polynomial_exp2(a)
        else:
            a = exponentials(a, SPLIT - 1)
        return tl.join(a, tl.exp2(b)).reshape(x.shape[0], x.shape[1])


@triton.jit
def attend(acc, total, top, s, v, c, LAZY: tl.constexpr, EXP_SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """One step of online softmax: the sum of weighted values, the sum of weights, and the maximum they refer to."""
    new = tl.maximum(top, tl.max(s, 1) * c)
    if LAZY:  # the reference may lag behind the maximum: weights stay exact, they are only not bounded by 1
        new = tl.where(new - top > LAZY_GROWTH, new, top)
    alpha = tl.exp2(top - new)
    p = exponentials(tl.fma(s, c, -new[:, None]), EXP_SPLIT)
    total = total * alpha + tl.sum(p, 1)
    if LAZY:
        if tl.max((new > top).to(tl.int32), 0) > 0:
            acc = acc * alpha[:, None]
    else:
        acc = acc * alpha[:, None]
    return tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION), total, new


@triton.jit
def finish(acc, total, top, out, lse, i0, o_n, N, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    i = i0 + tl.arange(0, BM)
    put(out, acc / tl.where(total > 0, total, 1.0)[:, None], i0, o_n, N, BM, D, BD)
    tl.store(lse + i, tl.where(total > 0, top + tl.log2(total), float("inf")), mask=i < N)


@triton.jit
def key_block(
    acc, total, top, x, k, v, weight, i0, j0, k_n, v_n, N, M, c, scale, bias, b_n, b_m, table, width,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    BIAS: tl.constexpr, RELATIVE: tl.constexpr, COSINE: tl.constexpr, LAZY: tl.constexpr, EXP_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`attend` to BN keys from j0 on; MASK where the block reaches over the last key or the diagonal."""
    y = tile(k, j0, k_n, M, BN, D, BD, MASK)
    if COSINE:
        y = unit(y, weight)
    s = logits(x, y, i0, j0, N, M, scale, bias, b_n, b_m, table, width, BM, BN, MASK, CAUSAL, BIAS, RELATIVE,
               PRECISION, False)
    z = tile(v, j0, v_n, M, BN, D, BD, MASK)
    return attend(acc, total, top, s, z, c, LAZY, EXP_SPLIT, PRECISION)


@triton.jit
def forward_kernel(
    q, k, v, bias, table, q_scale, k_scale, out, lse,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, b_b, b_h, b_n, b_m, o_b, o_h, o_n, H, N, M, width, scale,
    D: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr, RELATIVE: tl.constexpr,
    COSINE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LAZY: tl.constexpr,
    EXP_SPLIT: tl.constexpr,
):  # fmt: skip
    """BM queries of one head. bias (B, H, N, M), table (H, offsets), scales (D,), out (B, H, N, D), lse (B, H, N)."""
    blocks = tl.cdiv(N, BM)
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks  # neighbours share keys in the L2 cache
    if CAUSAL:
        block = blocks - 1 - block  # the longest first
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    i0 = block * BM
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    bias += b * b_b + h * b_h
    if RELATIVE:
        table += h * ((2 * (N // width) - 1) * (2 * width - 1))
    c = scale * LOG2E
    x = tile(q + b * q_b + h * q_h, i0, q_n, N, BM, D, BD, True)
    weight = x
    if COSINE:
        x = unit(x, vector(q_scale, D, BD))
        weight = vector(k_scale, D, BD)
    acc = tl.zeros((BM, BD), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), MASKED, tl.float32)
    end = tl.minimum(M, i0 + BM) if CAUSAL else M
    whole = (i0 + 1) // BN * BN if CAUSAL else M // BN * BN
    # Loops that may not run stand behind an `if`: where "never ran" and "matrix products in flight" meet, ptxas makes
    # every wgmma wait for the one before (C7515).
    if whole > 0:
        for j0 in range(0, whole, BN):
            acc, total, top = key_block(acc, total, top, x, k, v, weight, i0, j0, k_n, v_n, N, M, c, scale, bias, b_n,
                                        b_m, table, width, D, BD, BM, BN, False, CAUSAL, BIAS, RELATIVE, COSINE, LAZY,
                                        EXP_SPLIT, PRECISION)
    if whole < end:
        for j0 in range(whole, end, BN):
            acc, total, top = key_block(acc, total, top, x, k, v, weight, i0, j0, k_n, v_n, N, M, c, scale, bias, b_n,
                                        b_m, table, width, D, BD, BM, BN, True, CAUSAL, BIAS, RELATIVE, COSINE, LAZY,
                                        EXP_SPLIT, PRECISION)
    finish(acc, total, top, out + b * o_b + h * o_h, lse + head.to(tl.int64) * N, i0, o_n, N, BM, D, BD)


@triton.jit
def cross_kernel(
    q, k, v, bias, table, q_scale, k_scale, out, lse,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, b_b, b_h, b_n, b_m, o_b, o_h, o_n, H, N, M, width, scale,
    D: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr, RELATIVE: tl.constexpr,
    COSINE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """TILES x BM queries of one head, all M <= BN keys at once; tensors as in `forward_kernel`."""
    blocks = tl.cdiv(N, BM * TILES)
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q += b * q_b + h * q_h
    out += b * o_b + h * o_h
    lse += head.to(tl.int64) * N
    bias += b * b_b + h * b_h
    if RELATIVE:
        table += h * ((2 * (N // width) - 1) * (2 * width - 1))
    c = scale * LOG2E
    y = tile(k + b * k_b + h * k_h, 0, k_n, M, BN, D, BD, True)
    z = tile(v + b * v_b + h * v_h, 0, v_n, M, BN, D, BD, True)
    if COSINE:
        y = unit(y, vector(k_scale, D, BD))
        weight = vector(q_scale, D, BD)
    for i0 in range(block * (BM * TILES), tl.minimum(N, (block + 1) * (BM * TILES)), BM):
        x = tile(q, i0, q_n, N, BM, D, BD, True)
        if COSINE:
            x = unit(x, weight)
        s = logits(x, y, i0, 0, N, M, scale, bias, b_n, b_m, table, width, BM, BN, True, CAUSAL, BIAS, RELATIVE,
                   PRECISION, False)
        top = tl.maximum(tl.max(s, 1) * c, MASKED)
        p = tl.exp2(tl.fma(s, c, -top[:, None]))
        acc = tl.dot(p.to(z.dtype), z, input_precision=PRECISION)
        finish(acc, tl.sum(p, 1), top, out, lse, i0, o_n, N, BM, D, BD)


def constants(q: Tensor, bias, table, q_scale, causal: bool) -> dict:
    """What every kernel of one call has in common."""
    d = q.shape[-1]
    return {"D": d, "BD": power(d), "CAUSAL": causal, "BIAS": bias is not None, "RELATIVE": table is not None,
            "COSINE": q_scale is not None, "PRECISION": "ieee"}


def rows_first(like: Tensor) -> Tensor:
    """An empty (B, H, N, D) whose memory is (B, N, H, D), so that merging the heads copies nothing."""
    b, h, n, d = like.shape
    return torch.empty(b, n, h, d, dtype=stored(like.dtype), device=like.device).transpose(1, 2)


def strides(*tensors: Tensor) -> list[int]:
    return [s for t in tensors for s in t.stride()[:3]]


def bias_strides(bias: Tensor | None, q: Tensor, k: Tensor) -> tuple[int, ...]:
    return (0, 0, 0, 0) if bias is None else bias.expand(*q.shape[:3], k.shape[2]).stride()


def unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, table: Tensor | None, q_scale: Tensor | None,
    k_scale: Tensor | None, scale: float, causal: bool, width: int, **options: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out (B, H, N, D) in q's dtype, lse (B, H, N) float32, base 2). scale > 0; table (H, (2h-1)(2w-1)), width = w.

    options override `config`: BM, BN, LAZY, EXP_SPLIT, TILES, num_warps, num_stages.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    table, q_scale, k_scale = (None if t is None else t.contiguous() for t in (table, q_scale, k_scale))
    (b, h, n, _), m = q.shape, k.shape[2]
    fixed = constants(q, bias, table, q_scale, causal)
    out, lse = rows_first(q), torch.empty(b, h, n, dtype=torch.float32, device=q.device)
    one_block = m <= MAX_ONE_BLOCK[q.element_size()] and "EXP_SPLIT" not in options and "LAZY" not in options
    at = config(architecture(q.device), fixed["BD"], "cross" if one_block else "forward", q.element_size(),
                fixed["BIAS"] or fixed["RELATIVE"])
    at["BM"] = min(at["BM"], power(n))
    at |= {"BN": power(m), "TILES": 4} if one_block else {"LAZY": 0, "EXP_SPLIT": 0}
    at |= options
    programs = triton.cdiv(n, at["BM"] * at.get("TILES", 1)) * b * h
    (cross_kernel if one_block else forward_kernel)[(programs,)](
        q, k, v, q if bias is None else bias, q if table is None else table,
        q if q_scale is None else q_scale, q if k_scale is None else k_scale, out, lse,
        *strides(q, k, v), *bias_strides(bias, q, k), *strides(out), h, n, m, width, scale, **fixed, **at,
    )  # fmt: skip
    return out.to(q.dtype), lse


def launches(arch: int, dtype: torch.dtype = torch.float16):
    """What benchmarks/aot.py compiles: every row of BLOCKS, forward and backward, and each kind of bias."""
    from t2ct.kernels import attention_backward as backward  # which imports this file

    kernels = {"forward": forward_kernel, "cross": cross_kernel, "dkdv": backward.dkdv_kernel,
               "dq": backward.dq_kernel, "bias": backward.bias_kernel}
    plain = {"CAUSAL": False, "BIAS": False, "RELATIVE": False, "COSINE": False, "PRECISION": "ieee"}
    forms = {"": {}, ", causal": {"CAUSAL": True}, ", bias": {"BIAS": True}, ", relative, cosine": {
        "RELATIVE": True, "COSINE": True}, ", lazy": {"LAZY": 1}, ", split": {"EXP_SPLIT": 2}}
    for direction, kernel in kernels.items():
        for d in (32, 64, 128):
            for form, changed in forms.items():
                if arch == 100 and "LAZY" in changed:  # Triton 3.7's compiler fails on it
                    continue
                if form and d != 32 and (d, form) != (64, ", bias"):
                    continue
                if changed.keys() & {"LAZY", "EXP_SPLIT"} and (direction != "forward" or dtype == torch.float32):
                    continue
                at = config(arch, d, direction, dtype.itemsize, bool(changed.keys() & {"BIAS", "RELATIVE"}))
                if "EXP_SPLIT" in changed:
                    at["BN"] = 64
                fixed = plain | {"D": d, "BD": d, "LAZY": 0, "EXP_SPLIT": 0, "TILES": 4, "b_m": 1} | at | changed
                if direction == "bias":
                    fixed |= {"BIAS": not fixed["RELATIVE"], "OF_TABLE": fixed["RELATIVE"]}
                names = kernel.arg_names
                half = [n for n in names if n in ("q", "k", "v", "bias", "table", "out", "do", "dq", "dk", "dv")]
                single = [n for n in names if n in ("q_scale", "k_scale", "lse", "delta", "partial", "dq_scale",
                                                    "dk_scale")]
                kinds = dict.fromkeys(half, POINTER[dtype]) | dict.fromkeys(single, "*fp32") | {"scale": "fp32"}
                yield {
                    "name": f"{direction}, D={d}{form}", "kernel": kernel,
                    "signature": {n: kinds.get(n, "i32") for n in names if n not in fixed},
                    "constexprs": {n: fixed[n] for n in names if n in fixed},
                    "num_warps": at["num_warps"], "num_stages": at["num_stages"],
                    "divisible": [*half, *single, *(n for n in names if n[1:2] == "_" and n != "b_m")],
                }  # fmt: skip
