"""Gradients of flash attention, from q, k, v, out and lse alone; see attention.py for the tensors.

delta_kernel  rowsum(dO O), what every other kernel subtracts
dkdv_kernel   a block of keys, over all queries; few keys (cross-attention) split the queries, partials merged in order
dq_kernel     a block of queries, over all keys
bias_kernel   gradient of the logits, summed over whatever shares a bias. It recomputes the products (two of the five
              that the others do) instead of writing (B, H, N, M) and reducing that: for a bias of one batch it needs
              1/B of the memory. For a relative bias a tile is (a row of the grid) x (a row dr above it): all tiles of
              one dr share their offsets, so they are added up on matrix units and only width^2 numbers per (head, dr)
              leave the kernel, whose diagonals `attention_backward` sums. Nothing of N x N, no scatter, no atomics.
"""

import torch
import triton
import triton.language as tl
from t2ct.kernels.attention import (
    LOG2E,
    bias_strides,
    constants,
    logits,
    put,
    rows_first,
    strides,
    tile,
    unit,
    unit_gradient,
    unit_stride,
    vector,
)
from t2ct.kernels.attention_plan import config
from t2ct.kernels.plan import architecture, power
from torch import Tensor

FILL = 264  # programs that keep the largest chips busy: two for each of 132 multiprocessors
SPLIT_ROWS = 1024  # no split of the queries is shorter


@triton.jit
def delta_kernel(
    out, do, delta, o_b, o_h, o_n, g_b, g_h, g_n, H, N, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr
):
    """delta (B, H, N) float32 = rowsum(do * out)."""
    blocks = tl.cdiv(N, BM)
    i0, head = tl.program_id(0) % blocks * BM, tl.program_id(0) // blocks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    o = tile(out + b * o_b + h * o_h, i0, o_n, N, BM, D, BD, True).to(tl.float32)
    g = tile(do + b * g_b + h * g_h, i0, g_n, N, BM, D, BD, True).to(tl.float32)
    i = i0 + tl.arange(0, BM)
    tl.store(delta + head.to(tl.int64) * N + i, tl.sum(o * g, 1), mask=i < N)


@triton.jit
def key_step(
    dk, dv, y, z, q, weight, do, lse, delta, i0, j0, q_n, g_n, N, M, scale, bias, b_n, b_m, table, width,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, CHECK: tl.constexpr,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, RELATIVE: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds a block of queries to dk and dv (BN, BD); logits lie with keys as rows, so no product wants a transpose."""
    x = tile(q, i0, q_n, N, BM, D, BD, CHECK)
    if COSINE:
        x = unit(x, weight)
    i = i0 + tl.arange(0, BM)
    if CHECK:
        row = tl.load(lse + i, mask=i < N, other=float("inf"))  # a weight of 0
        d = tl.load(delta + i, mask=i < N, other=0.0)
    else:
        row, d = tl.load(lse + i), tl.load(delta + i)
    s = logits(x, y, i0, j0, N, M, scale, bias, b_n, b_m, table, width, BM, BN, MASK, CAUSAL, BIAS, RELATIVE, PRECISION,
               True)
    p = tl.exp2(tl.fma(s, scale * LOG2E, -row[None, :]))
    g = tile(do, i0, g_n, N, BM, D, BD, CHECK)
    dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
    ds = p * (tl.dot(z, g.T, input_precision=PRECISION) - d[None, :])
    return tl.dot(ds.to(x.dtype), x, dk, input_precision=PRECISION), dv


@triton.jit
def dkdv_kernel(
    q, k, v, bias, table, q_scale, k_scale, do, lse, delta, dk, dv, dk_scale,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, b_b, b_h, b_n, b_m, g_b, g_h, g_n, d_s, d_b, d_h, d_n,
    H, N, M, width, scale, chunk,
    D: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr, RELATIVE: tl.constexpr,
    COSINE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BN keys of one head against queries [split * chunk, (split + 1) * chunk), chunk a multiple of BM.

    dk, dv (splits, B, H, M, D) of the strides d, dk_scale (splits, programs, D) float32.
    """
    blocks = tl.cdiv(M, BN)
    j0, head = tl.program_id(0) % blocks * BN, tl.program_id(0) // blocks
    split = tl.program_id(1)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q += b * q_b + h * q_h
    do += b * g_b + h * g_h
    bias += b * b_b + h * b_h
    lse += head.to(tl.int64) * N
    delta += head.to(tl.int64) * N
    if RELATIVE:
        table += h * ((2 * (N // width) - 1) * (2 * width - 1))
    raw = tile(k + b * k_b + h * k_h, j0, k_n, M, BN, D, BD, True)
    z = tile(v + b * v_b + h * v_h, j0, v_n, M, BN, D, BD, True)
    y = raw
    weight = z
    if COSINE:
        y = unit(raw, vector(k_scale, D, BD))
        weight = vector(q_scale, D, BD)
    gk = tl.zeros((BN, BD), tl.float32)
    gv = tl.zeros((BN, BD), tl.float32)
    first, end = split * chunk, tl.minimum(N, (split + 1) * chunk)
    clean = first
    if CAUSAL:
        clean = tl.minimum(tl.maximum(first, tl.cdiv(j0 + BN - 1, BM) * BM), end)
        first = tl.maximum(first, j0 // BM * BM)
        for i0 in range(first, clean, BM):
            gk, gv = key_step(gk, gv, y, z, q, weight, do, lse, delta, i0, j0, q_n, g_n, N, M, scale, bias, b_n, b_m,
                              table, width, D, BD, BM, BN, True, True, CAUSAL, BIAS, RELATIVE, COSINE, PRECISION)
    ragged = tl.maximum(clean, end // BM * BM)
    for i0 in range(clean, ragged, BM):
        gk, gv = key_step(gk, gv, y, z, q, weight, do, lse, delta, i0, j0, q_n, g_n, N, M, scale, bias, b_n, b_m,
                          table, width, D, BD, BM, BN, False, False, CAUSAL, BIAS, RELATIVE, COSINE, PRECISION)
    for i0 in range(ragged, end, BM):
        gk, gv = key_step(gk, gv, y, z, q, weight, do, lse, delta, i0, j0, q_n, g_n, N, M, scale, bias, b_n, b_m,
                          table, width, D, BD, BM, BN, False, True, CAUSAL, BIAS, RELATIVE, COSINE, PRECISION)
    at = split.to(tl.int64) * d_s + b * d_b + h * d_h
    gk *= scale
    if COSINE:
        gk, share = unit_gradient(raw, vector(k_scale, D, BD), gk)
        d = tl.arange(0, BD)
        share = tl.where((j0 + tl.arange(0, BN) < M)[:, None], share, 0.0)
        row = split.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        tl.store(dk_scale + row * D + d, tl.sum(share, 0), mask=d < D)
    put(dk + at, gk, j0, d_n, M, BN, D, BD)
    put(dv + at, gv, j0, d_n, M, BN, D, BD)


@triton.jit
def query_step(
    acc, x, g, k, v, weight, row, d, i0, j0, k_n, v_n, N, M, c, scale, bias, b_n, b_m, table, width,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    BIAS: tl.constexpr, RELATIVE: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds a block of keys to dq (BM, BD)."""
    y = tile(k, j0, k_n, M, BN, D, BD, MASK)
    if COSINE:
        y = unit(y, weight)
    s = logits(x, y, i0, j0, N, M, scale, bias, b_n, b_m, table, width, BM, BN, MASK, CAUSAL, BIAS, RELATIVE,
               PRECISION, False)
    dp = tl.dot(g, tile(v, j0, v_n, M, BN, D, BD, MASK).T, input_precision=PRECISION)
    ds = tl.exp2(tl.fma(s, c, -row[:, None])) * (dp - d[:, None])
    return tl.dot(ds.to(y.dtype), y, acc, input_precision=PRECISION)


@triton.jit
def dq_kernel(
    q, k, v, bias, table, q_scale, k_scale, do, lse, delta, dq, dq_scale,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, b_b, b_h, b_n, b_m, g_b, g_h, g_n, d_b, d_h, d_n,
    H, N, M, width, scale,
    D: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr, RELATIVE: tl.constexpr,
    COSINE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM queries of one head. dq (B, H, N, D) of the strides d, dq_scale (programs, D) float32."""
    blocks = tl.cdiv(N, BM)
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    if CAUSAL:
        block = blocks - 1 - block
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    i0 = block * BM
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    bias += b * b_b + h * b_h
    if RELATIVE:
        table += h * ((2 * (N // width) - 1) * (2 * width - 1))
    c = scale * LOG2E
    raw = tile(q + b * q_b + h * q_h, i0, q_n, N, BM, D, BD, True)
    x, weight = raw, raw
    if COSINE:
        x = unit(raw, vector(q_scale, D, BD))
        weight = vector(k_scale, D, BD)
    g = tile(do + b * g_b + h * g_h, i0, g_n, N, BM, D, BD, True)
    i = i0 + tl.arange(0, BM)
    at = head.to(tl.int64) * N + i
    row = tl.load(lse + at, mask=i < N, other=float("inf"))
    d = tl.load(delta + at, mask=i < N, other=0.0)
    acc = tl.zeros((BM, BD), tl.float32)
    end = tl.minimum(M, i0 + BM) if CAUSAL else M
    whole = (i0 + 1) // BN * BN if CAUSAL else M // BN * BN
    if whole > 0:
        for j0 in range(0, whole, BN):
            acc = query_step(acc, x, g, k, v, weight, row, d, i0, j0, k_n, v_n, N, M, c, scale, bias, b_n, b_m, table,
                             width, D, BD, BM, BN, False, CAUSAL, BIAS, RELATIVE, COSINE, PRECISION)
    if whole < end:
        for j0 in range(whole, end, BN):
            acc = query_step(acc, x, g, k, v, weight, row, d, i0, j0, k_n, v_n, N, M, c, scale, bias, b_n, b_m, table,
                             width, D, BD, BM, BN, True, CAUSAL, BIAS, RELATIVE, COSINE, PRECISION)
    acc *= scale
    if COSINE:
        acc, share = unit_gradient(raw, vector(q_scale, D, BD), acc)
        e = tl.arange(0, BD)
        share = tl.where((i < N)[:, None], share, 0.0)
        tl.store(dq_scale + tl.program_id(0).to(tl.int64) * D + e, tl.sum(share, 0), mask=e < D)
    put(dq + b * d_b + h * d_h, acc, i0, d_n, N, BM, D, BD)


@triton.jit
def bias_kernel(
    q, k, v, bias, table, q_scale, k_scale, do, lse, delta, partial,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, b_b, b_h, b_n, b_m, g_b, g_h, g_n, H, N, M, width, scale, B, BB, BH,
    D: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr, RELATIVE: tl.constexpr,
    COSINE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, OF_TABLE: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits summed over the batch rows and heads that share a bias.

    OF_TABLE: partial (splits, H, 2 height - 1, width, width), programs (H * (2 height - 1), splits) over the batch.
    Else:     partial (BB, BH, N, M), bias of BB batch rows (1 or B) and BH heads (1 or H), programs (tiles, BB * BH).
    """
    pid, group = tl.program_id(0), tl.program_id(1)
    r, t = tl.arange(0, BM), tl.arange(0, BN)
    if OF_TABLE:
        height = N // width
        line, dr = pid // (2 * height - 1), pid % (2 * height - 1) - (height - 1)
        shared = height - tl.abs(dr)  # rows of the grid that have a row dr above them
        per = tl.cdiv(B, tl.num_programs(1))
        count = tl.maximum(tl.minimum(B, (group + 1) * per) - group * per, 0) * shared
        rows, columns = width, width
    else:
        blocks = tl.cdiv(M, BN)
        i0, j0 = pid // blocks * BM, pid % blocks * BN
        heads = H // BH
        count = B // BB * heads
        rows, columns = N - i0, M - j0
    if COSINE:
        w_q, w_k = vector(q_scale, D, BD), vector(k_scale, D, BD)
    c = scale * LOG2E
    inside = (r < rows)[:, None] & (t < columns)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for n in range(0, count):
        if OF_TABLE:
            i0 = (tl.maximum(dr, 0) + n % shared) * width
            j0 = i0 - dr * width
            b, h = group * per + n // shared, line
        else:
            b, h = group // BH + n // heads, group % BH + n % heads
        b, h = tl.cast(b, tl.int64), tl.cast(h, tl.int64)
        x = tile(q + b * q_b + h * q_h, i0, q_n, i0 + rows, BM, D, BD, True)
        y = tile(k + b * k_b + h * k_h, j0, k_n, j0 + columns, BN, D, BD, True)
        if COSINE:
            x, y = unit(x, w_q), unit(y, w_k)
        g = tile(do + b * g_b + h * g_h, i0, g_n, i0 + rows, BM, D, BD, True)
        z = tile(v + b * v_b + h * v_h, j0, v_n, j0 + columns, BN, D, BD, True)
        at = (b * H + h) * N + i0 + r
        row = tl.load(lse + at, mask=r < rows, other=float("inf"))
        d = tl.load(delta + at, mask=r < rows, other=0.0)
        of_head = table
        if RELATIVE:
            of_head += h * ((2 * (N // width) - 1) * (2 * width - 1))
        s = logits(x, y, i0, j0, N, M, scale, bias + b * b_b + h * b_h, b_n, b_m, of_head, width, BM, BN, True, CAUSAL,
                   BIAS, RELATIVE, PRECISION, False)
        dp = tl.dot(g, z.T, input_precision=PRECISION)
        acc += tl.where(inside, tl.exp2(tl.fma(s, c, -row[:, None])) * (dp - d[:, None]), 0.0)
    if OF_TABLE:
        at = (group * tl.num_programs(0) + pid).to(tl.int64) * width * width
        tl.store(partial + at + r[:, None] * width + t[None, :], acc, mask=inside)
    else:
        at = (group.to(tl.int64) * N + i0 + r[:, None]) * M + j0 + t[None, :]
        tl.store(partial + at, acc, mask=inside)


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, table: Tensor | None, q_scale: Tensor | None,
    k_scale: Tensor | None, out: Tensor, lse: Tensor, scale: float, causal: bool, width: int, needs: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of (q, k, v, bias, table, q_scale, k_scale), None where `needs` is False. do (B, H, N, D)."""
    do, q, k, v = (unit_stride(t) for t in (do, q, k, v))
    table, q_scale, k_scale = (None if t is None else t.contiguous() for t in (table, q_scale, k_scale))
    (b, h, n, d), m = q.shape, k.shape[2]
    fixed = constants(q, bias, table, q_scale, causal)
    arch, size = architecture(q.device), q.element_size()
    biased_call = fixed["BIAS"] or fixed["RELATIVE"]
    delta = torch.empty_like(lse)
    delta_kernel[(triton.cdiv(n, 64) * b * h,)](
        out, do, delta, *strides(out, do), h, n, D=d, BD=fixed["BD"], BM=64, num_warps=4)
    tensors = (q, k, v, q if bias is None else bias, q if table is None else table, q if q_scale is None else q_scale,
               q if k_scale is None else k_scale, do, lse, delta)
    steps = *strides(q, k, v), *bias_strides(bias, q, k), *strides(do)
    made: list[Tensor | None] = [None] * 7
    if needs[0] or needs[5]:
        at = config(arch, fixed["BD"], "dq", size, biased_call)
        at |= {"BM": min(at["BM"], power(n)), "BN": min(at["BN"], power(m))}
        programs = triton.cdiv(n, at["BM"]) * b * h
        dq, partial = rows_first(q), _single(q_scale, programs, d, lse)
        dq_kernel[(programs,)](*tensors, dq, partial, *steps, *strides(dq), h, n, m, width, scale, **fixed, **at)
        made[0] = dq.to(q.dtype)
        made[5] = None if q_scale is None else partial.sum(0).to(q_scale.dtype)
    if needs[1] or needs[2] or needs[6]:
        at = config(arch, fixed["BD"], "dkdv", size, biased_call)
        at |= {"BM": min(at["BM"], power(n)), "BN": min(at["BN"], power(m))}
        programs = triton.cdiv(m, at["BN"]) * b * h
        splits = max(1, min(triton.cdiv(FILL, programs), n // SPLIT_ROWS))
        chunk = triton.cdiv(triton.cdiv(n, splits), at["BM"]) * at["BM"]
        shape = (splits, b, m, h, d)  # as `rows_first` lays them
        parts = [torch.empty(shape, device=q.device) for _ in "kv"] if splits > 1 else []
        dk, dv = [t.transpose(2, 3) for t in parts] or [rows_first(k)[None] for _ in "kv"]
        partial = _single(k_scale, programs * splits, d, lse)
        dkdv_kernel[(programs, splits)](
            *tensors, dk, dv, partial, *steps, *dk.stride()[:4], h, n, m, width, scale, chunk, **fixed, **at)
        whole = [t.sum(0).transpose(1, 2) for t in parts] or [t[0] for t in (dk, dv)]
        made[1], made[2] = (t.to(k.dtype) for t in whole)
        made[6] = None if k_scale is None else partial.sum(0).to(k_scale.dtype)
    at = config(arch, fixed["BD"], "bias", size)
    if bias is not None and needs[3]:
        shared = (1,) * (4 - bias.dim()) + tuple(bias.shape)
        partial = torch.empty(*shared[:2], n, m, device=q.device)
        grid = triton.cdiv(n, at["BM"]) * triton.cdiv(m, at["BN"]), shared[0] * shared[1]
        bias_kernel[grid](*tensors, partial, *steps, h, n, m, width, scale, b, *shared[:2], OF_TABLE=False, **fixed,
                          **at)
        made[3] = partial.sum_to_size(bias.shape).to(bias.dtype)
    if table is not None and needs[4]:
        high, side = n // width, power(width)
        at |= {"BM": side, "BN": side, "num_warps": 8 if side == 128 else 4, "num_stages": 1}
        splits = min(b, 8)
        partial = torch.empty(splits, h, 2 * high - 1, width, width, device=q.device)
        bias_kernel[(h * (2 * high - 1), splits)](
            *tensors, partial, *steps, h, n, m, width, scale, b, 1, 1, OF_TABLE=True, **fixed, **at)
        made[4] = _diagonals(partial.sum(0)).flatten(1).to(table.dtype)
    return tuple(made)


def _single(weight: Tensor | None, rows: int, d: int, other: Tensor) -> Tensor:
    """Room for the partial sums of a scale's gradient, or any tensor where there is no scale."""
    return other if weight is None else torch.empty(rows, d, device=weight.device)


def _diagonals(x: Tensor) -> Tensor:
    """(..., w, w) -> (..., 2w - 1): sums over i - j = -(w - 1) ... w - 1. Padding skews the rows, one sum adds them."""
    w = x.shape[-1]
    skewed = torch.nn.functional.pad(x.flip(-1), (0, w)).flatten(-2)[..., : w * (2 * w - 1)]
    return skewed.unflatten(-1, (w, 2 * w - 1)).sum(-2)
