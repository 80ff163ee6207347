"""Backward of attention with rotary positions: d(out) to d(qkv), in the layout and with the tiles of rope_attention.py.

With S = scale q k', P = exp(S - lse), delta = rowsum(d(out) * out):
    dV = P' d(out)      dS = P * (d(out) V' - delta) * scale      dQ = dS K      dK = dS' Q
q and k are rotated again on the way in, dq and dk turned back on the way out. The score tile of the dk, dv pass is held
transposed (keys by queries), so that both its products take the accumulator's layout as their first operand.
"""

import triton
import triton.language as tl

from dinov3core.kernels.rope import load_rows, load_turned, store_turned_back
from dinov3core.kernels.rope_attention import scores
from dinov3core.kernels.tiles import LOG2E


@triton.jit
def _query_rows(
    base, sin, cos, out, dout, rows, limit, prefix, stride_t, stride_s, stride_o,
    D: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rotated q pairs, d(out) and delta of some rows."""
    q1, q2 = load_turned(base, sin, cos, rows, limit, prefix, stride_t, stride_s, D // 2, ROTATE, INTERLEAVED, True)
    do = load_rows(dout, rows, limit, stride_o, D, True)
    o = load_rows(out, rows, limit, stride_o, D, True)
    return q1, q2, do, tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)


@triton.jit
def _key_tile(k1, k2, v, q1, q2, do, lse2, delta, dk1, dk2, dv, log2_scale, DOT: tl.constexpr):
    """Add one tile of queries to dk, dv of a tile of keys."""
    pt = tl.math.exp2(scores(k1, k2, q1, q2, DOT) * log2_scale - lse2[None, :])
    dv = tl.dot(pt.to(do.dtype).to(DOT), do.to(DOT), dv)
    dpt = tl.dot(v.to(DOT), tl.trans(do.to(DOT)))
    dst = (pt * (dpt - delta[None, :])).to(q1.dtype).to(DOT)
    return tl.dot(dst, q1.to(DOT), dk1), tl.dot(dst, q2.to(DOT), dk2), dv


@triton.jit
def _query_tile(q1, q2, do, lse2, delta, k1, k2, v, dq1, dq2, real_keys, log2_scale, DOT: tl.constexpr):
    """Add one tile of keys to dq of a tile of queries. Rows of k beyond `real_keys` are zero but may overflow p."""
    p = tl.math.exp2(scores(q1, q2, k1, k2, DOT) * log2_scale - lse2[:, None])
    if real_keys is not None:
        p = tl.where((tl.arange(0, k1.shape[0]) < real_keys)[None, :], p, 0.0)
    dp = tl.dot(do.to(DOT), tl.trans(v.to(DOT)))
    ds = (p * (dp - delta[:, None])).to(k1.dtype).to(DOT)
    return tl.dot(ds, k1.to(DOT), dq1), tl.dot(ds, k2.to(DOT), dq2)


@triton.jit
def _backward_one_tile(
    qkv, sin, cos, out, dout, lse, dqkv, scale, N, prefix, H, token0, tokens,
    stride_t, stride_p, stride_h, grad_t, grad_p, grad_h, stride_s, stride_o,
    D: tl.constexpr, BLOCK: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A whole (image, head) of N <= BLOCK tokens: five products, everything stays in registers."""
    HALF: tl.constexpr = D // 2
    head = tl.program_id(0) % H
    start = token0 + (tl.program_id(0) // H).to(tl.int64) * N
    base = qkv + start * stride_t + head * stride_h
    grad = dqkv + start * grad_t + head * grad_h
    flat = start * stride_o + head * D
    rows = tl.arange(0, BLOCK)
    q1, q2, do, delta = _query_rows(
        base, sin, cos, out + flat, dout + flat, rows, N, prefix, stride_t, stride_s, stride_o, D, ROTATE, INTERLEAVED
    )
    k1, k2 = load_turned(
        base + stride_p, sin, cos, rows, N, prefix, stride_t, stride_s, HALF, ROTATE, INTERLEAVED, True
    )
    v = load_rows(base + 2 * stride_p, rows, N, stride_t, D, True)
    # a query beyond N gets P = exp(-inf) = 0; a key beyond N could overflow P against a very low lse, so it is masked
    lse2 = tl.load(lse + head * tokens + start + rows, mask=rows < N, other=float("inf")) * LOG2E
    pt = tl.math.exp2(scores(k1, k2, q1, q2, DOT) * (scale * LOG2E) - lse2[None, :])
    pt = tl.where((rows < N)[:, None], pt, 0.0)
    dv = tl.dot(pt.to(do.dtype).to(DOT), do.to(DOT))
    dpt = tl.dot(v.to(DOT), tl.trans(do.to(DOT)))
    dst = (pt * (dpt - delta[None, :])).to(q1.dtype).to(DOT)
    dk1 = tl.dot(dst, q1.to(DOT)) * scale
    dk2 = tl.dot(dst, q2.to(DOT)) * scale
    store_turned_back(
        grad + grad_p, dk1, dk2, sin, cos, rows, N, prefix, grad_t, stride_s, HALF, ROTATE, INTERLEAVED
    )
    tl.store(
        grad + 2 * grad_p + rows[:, None] * grad_t + tl.arange(0, D)[None, :],
        dv.to(dqkv.dtype.element_ty), mask=(rows < N)[:, None],
    )  # fmt: skip
    ds = tl.trans(dst)
    dq1 = tl.dot(ds, k1.to(DOT)) * scale
    dq2 = tl.dot(ds, k2.to(DOT)) * scale
    store_turned_back(grad, dq1, dq2, sin, cos, rows, N, prefix, grad_t, stride_s, HALF, ROTATE, INTERLEAVED)


@triton.jit
def _backward(
    qkv, sin, cos, out, dout, lse, delta, dqkv, scale, N, prefix, H, token0, tokens,
    stride_t, stride_p, stride_h, grad_t, grad_p, grad_h, stride_s, stride_o,
    D: tl.constexpr, DQ_M: tl.constexpr, DQ_N: tl.constexpr, DQ_R: tl.constexpr,
    DKV_M: tl.constexpr, DKV_N: tl.constexpr, DKV_R: tl.constexpr, STAGES: tl.constexpr,
    PREFIX_IN_LOOP: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A whole (image, head) in two passes: dq by query blocks of DQ_M, then dk, dv by key blocks of DKV_N.

    DQ_N keys, DKV_M queries per step of the inner loops; DQ_R, DKV_R the padded remainders they start with.
    """
    HALF: tl.constexpr = D // 2
    head = tl.program_id(0) % H
    start = token0 + (tl.program_id(0) // H).to(tl.int64) * N
    base = qkv + start * stride_t + head * stride_h
    grad = dqkv + start * grad_t + head * grad_h
    out += start * stride_o + head * D
    dout += start * stride_o + head * D
    lse += head * tokens + start
    delta += head * tokens + start
    log2_scale = scale * LOG2E
    key, value = base + stride_p, base + 2 * stride_p

    for row0 in tl.range(0, N, DQ_M):
        rows = row0 + tl.arange(0, DQ_M)
        q1, q2, do, row_delta = _query_rows(
            base, sin, cos, out, dout, rows, N, prefix, stride_t, stride_s, stride_o, D, ROTATE, INTERLEAVED
        )
        tl.store(delta + rows, row_delta, mask=rows < N)
        lse2 = tl.load(lse + rows, mask=rows < N, other=float("inf")) * LOG2E
        r = (N - 1) % DQ_N + 1
        keys = tl.arange(0, DQ_R)
        k1, k2 = load_turned(key, sin, cos, keys, r, prefix, stride_t, stride_s, HALF, ROTATE, INTERLEAVED, True)
        v = load_rows(value, keys, r, stride_t, D, True)
        zero = tl.zeros([DQ_M, HALF], tl.float32)
        dq1, dq2 = _query_tile(q1, q2, do, lse2, row_delta, k1, k2, v, zero, zero, r, log2_scale, DOT)
        for key0 in tl.range(r, N, DQ_N, num_stages=STAGES):
            keys = key0 + tl.arange(0, DQ_N)
            k1, k2 = load_turned(
                key, sin, cos, keys, N, prefix, stride_t, stride_s, HALF, ROTATE, INTERLEAVED, PREFIX_IN_LOOP
            )
            v = load_rows(value, keys, N, stride_t, D, False)
            dq1, dq2 = _query_tile(q1, q2, do, lse2, row_delta, k1, k2, v, dq1, dq2, None, log2_scale, DOT)
        store_turned_back(
            grad, dq1 * scale, dq2 * scale, sin, cos, rows, N, prefix, grad_t, stride_s, HALF, ROTATE, INTERLEAVED
        )

    tl.debug_barrier()  # delta was written by other threads of this program
    for key0 in tl.range(0, N, DKV_N):
        keys = key0 + tl.arange(0, DKV_N)
        k1, k2 = load_turned(key, sin, cos, keys, N, prefix, stride_t, stride_s, HALF, ROTATE, INTERLEAVED, True)
        v = load_rows(value, keys, N, stride_t, D, True)
        r = (N - 1) % DKV_M + 1
        rows = tl.arange(0, DKV_R)
        q1, q2 = load_turned(base, sin, cos, rows, r, prefix, stride_t, stride_s, HALF, ROTATE, INTERLEAVED, True)
        do = load_rows(dout, rows, r, stride_o, D, True)
        lse2 = tl.load(lse + rows, mask=rows < r, other=float("inf")) * LOG2E
        row_delta = tl.load(delta + rows, mask=rows < r, other=0.0)
        zero = tl.zeros([DKV_N, HALF], tl.float32)
        dv = tl.zeros([DKV_N, D], tl.float32)
        dk1, dk2, dv = _key_tile(k1, k2, v, q1, q2, do, lse2, row_delta, zero, zero, dv, log2_scale, DOT)
        for row0 in tl.range(r, N, DKV_M, num_stages=STAGES):
            rows = row0 + tl.arange(0, DKV_M)
            q1, q2 = load_turned(
                base, sin, cos, rows, N, prefix, stride_t, stride_s, HALF, ROTATE, INTERLEAVED, PREFIX_IN_LOOP
            )
            do = load_rows(dout, rows, N, stride_o, D, False)
            lse2 = tl.load(lse + rows) * LOG2E
            row_delta = tl.load(delta + rows)
            dk1, dk2, dv = _key_tile(k1, k2, v, q1, q2, do, lse2, row_delta, dk1, dk2, dv, log2_scale, DOT)
        store_turned_back(
            grad + grad_p, dk1 * scale, dk2 * scale, sin, cos, keys, N, prefix, grad_t, stride_s,
            HALF, ROTATE, INTERLEAVED,
        )  # fmt: skip
        tl.store(
            grad + 2 * grad_p + keys[:, None] * grad_t + tl.arange(0, D)[None, :],
            dv.to(dqkv.dtype.element_ty), mask=(keys < N)[:, None],
        )  # fmt: skip
