"""Backward of attention with rotary positions: d(out) to d(qkv), as rope_attention.py goes forward.

With S = scale q k', P = exp(S - lse), delta = rowsum(d(out) * out):
    dV = P' d(out)      dS = P * (d(out) V' - delta) * scale      dQ = dS K      dK = dS' Q
q and k are rotated again on the way in, dq and dk turned back on the way out. The score tile of the
dk, dv pass is held transposed (keys by queries), so that both its products take the accumulator's
layout as their first operand.
"""

from collections.abc import Callable, Iterator

import triton
import triton.language as tl
from torch import Tensor

from dinov3core.kernels import launch
from dinov3core.kernels.rope import Packing, load_rows, load_turned, runs, store_turned_back
from dinov3core.kernels.rope_attention import load_keys, scores
from dinov3core.kernels.tiles import (
    EXACT,
    LOG2E,
    dot_dtype,
    front_remainder,
    on_device,
    padded,
    unit_stride,
)


@triton.jit
def _load_delta(out, dout, rows, limit, stride_o, D: tl.constexpr):
    """d(out) rows and their sums of d(out) * out."""
    do = load_rows(dout, rows, limit, stride_o, D, True)
    o = load_rows(out, rows, limit, stride_o, D, True)
    return do, tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)


@triton.jit
def _load_queries(
    base, tables, dout, lse, delta, rows, limit, stride_t, stride_o,
    D: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What the dk, dv pass reads per query: rotated q, d(out), log2-sum-exp, delta.

    The log-sum-exp is infinite from `limit` on, so that P = exp2(S - inf) = 0 there.
    """
    q1, q2 = load_turned(base, tables, rows, limit, stride_t, D // 2, ROTATE, INTERLEAVED, MASKED)
    do = load_rows(dout, rows, limit, stride_o, D, MASKED)
    if MASKED:
        lse2 = tl.load(lse + rows, mask=rows < limit, other=float("inf")) * LOG2E
        row_delta = tl.load(delta + rows, mask=rows < limit, other=0.0)
    else:
        lse2 = tl.load(lse + rows) * LOG2E
        row_delta = tl.load(delta + rows)
    return q1, q2, do, lse2, row_delta


@triton.jit
def _store_key_gradients(
    base, tables, dk1, dk2, dv, keys, limit, stride_dt, stride_dp,
    D: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """dk, turned back, and dv into the d(qkv) of one head."""
    store_turned_back(
        base + stride_dp, dk1, dk2, tables, keys, limit, stride_dt, D // 2, ROTATE, INTERLEAVED
    )
    at = base + 2 * stride_dp + keys[:, None] * stride_dt + tl.arange(0, D)[None, :]
    tl.store(at, dv.to(base.dtype.element_ty), mask=(keys < limit)[:, None])


@triton.jit
def _add_queries(k1, k2, v, q1, q2, do, lse2, delta, dk1, dk2, dv, log2_scale, DOT: tl.constexpr):
    """Add one tile of queries to dk, dv of a tile of keys."""
    pt = tl.math.exp2(scores(k1, k2, q1, q2, DOT) * log2_scale - lse2[None, :])
    dv = tl.dot(pt.to(do.dtype).to(DOT), do.to(DOT), dv, input_precision=EXACT)
    dpt = tl.dot(v.to(DOT), tl.trans(do.to(DOT)), input_precision=EXACT)
    # without `scale`, which multiplies the finished sums once
    dst = (pt * (dpt - delta[None, :])).to(q1.dtype).to(DOT)
    dk1 = tl.dot(dst, q1.to(DOT), dk1, input_precision=EXACT)
    dk2 = tl.dot(dst, q2.to(DOT), dk2, input_precision=EXACT)
    return dk1, dk2, dv


@triton.jit
def _add_keys(
    q1, q2, do, lse2, delta, k1, k2, v, dq1, dq2, real_keys, log2_scale, DOT: tl.constexpr
):
    """Add one tile of keys to dq of a tile of queries.

    Rows of k beyond `real_keys` are zero but may overflow p.
    """
    p = tl.math.exp2(scores(q1, q2, k1, k2, DOT) * log2_scale - lse2[:, None])
    if real_keys is not None:
        p = tl.where((tl.arange(0, k1.shape[0]) < real_keys)[None, :], p, 0.0)
    dp = tl.dot(do.to(DOT), tl.trans(v.to(DOT)), input_precision=EXACT)
    ds = (p * (dp - delta[:, None])).to(k1.dtype).to(DOT)
    dq1 = tl.dot(ds, k1.to(DOT), dq1, input_precision=EXACT)
    dq2 = tl.dot(ds, k2.to(DOT), dq2, input_precision=EXACT)
    return dq1, dq2


@triton.jit(do_not_specialize=["N", "prefix", "H", "token0", "tokens"])
def _rope_attention_backward_one_tile_kernel(
    qkv, sin, cos, out, dout, lse, delta, dqkv, scale, N, prefix, H, token0, tokens,
    stride_t, stride_p, stride_h, stride_dt, stride_dp, stride_dh, stride_s, stride_o,
    D: tl.constexpr, BLOCK: tl.constexpr,
    ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A whole (image, head) of N <= BLOCK tokens: five products, everything in registers.

    `delta` is not used: it is here as for the other kernel.
    """
    HALF: tl.constexpr = D // 2
    head = tl.program_id(0) % H
    start = token0 + (tl.program_id(0) // H).to(tl.int64) * N  # int64: all offsets derive from it
    base = qkv + start * stride_t + head * stride_h
    dbase = dqkv + start * stride_dt + head * stride_dh
    flat = start * stride_o + head * D
    rows = tl.arange(0, BLOCK)
    tables = (sin, cos, prefix, stride_s)
    q1, q2 = load_turned(base, tables, rows, N, stride_t, HALF, ROTATE, INTERLEAVED, True)
    do, delta = _load_delta(out + flat, dout + flat, rows, N, stride_o, D)
    k1, k2, v = load_keys(base, tables, rows, N, stride_t, stride_p, D, ROTATE, INTERLEAVED, True)

    # A query beyond N gets P = exp2(-inf) = 0. A key beyond N could overflow P against a very low
    # log-sum-exp, and inf * 0 is NaN, so it is masked.
    lse2 = tl.load(lse + head * tokens + start + rows, mask=rows < N, other=float("inf")) * LOG2E
    pt = tl.math.exp2(scores(k1, k2, q1, q2, DOT) * (scale * LOG2E) - lse2[None, :])
    pt = tl.where((rows < N)[:, None], pt, 0.0)
    dv = tl.dot(pt.to(do.dtype).to(DOT), do.to(DOT), input_precision=EXACT)
    dpt = tl.dot(v.to(DOT), tl.trans(do.to(DOT)), input_precision=EXACT)
    dst = (pt * (dpt - delta[None, :])).to(q1.dtype).to(DOT)
    dk1 = tl.dot(dst, q1.to(DOT), input_precision=EXACT) * scale
    dk2 = tl.dot(dst, q2.to(DOT), input_precision=EXACT) * scale
    # dk and dv leave before dq is computed: fewer accumulators live at once
    _store_key_gradients(
        dbase, tables, dk1, dk2, dv, rows, N, stride_dt, stride_dp, D, ROTATE, INTERLEAVED
    )

    ds = tl.trans(dst)
    dq1 = tl.dot(ds, k1.to(DOT), input_precision=EXACT) * scale
    dq2 = tl.dot(ds, k2.to(DOT), input_precision=EXACT) * scale
    store_turned_back(dbase, dq1, dq2, tables, rows, N, stride_dt, HALF, ROTATE, INTERLEAVED)


@triton.jit(do_not_specialize=["N", "prefix", "H", "token0", "tokens"])
def _rope_attention_backward_two_pass_kernel(
    qkv, sin, cos, out, dout, lse, delta, dqkv, scale, N, prefix, H, token0, tokens,
    stride_t, stride_p, stride_h, stride_dt, stride_dp, stride_dh, stride_s, stride_o,
    D: tl.constexpr, DQ_M: tl.constexpr, DQ_N: tl.constexpr, DQ_R: tl.constexpr,
    DKV_M: tl.constexpr, DKV_N: tl.constexpr, DKV_R: tl.constexpr,
    STAGES: tl.constexpr, PREFIX_IN_LOOP: tl.constexpr,
    ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A whole (image, head): first dq by query blocks of DQ_M, then dk, dv by key blocks of DKV_N.

    DQ_N keys, DKV_M queries per step of the inner loops; DQ_R, DKV_R the padded remainders they
    start with.
    """
    HALF: tl.constexpr = D // 2
    head = tl.program_id(0) % H
    start = token0 + (tl.program_id(0) // H).to(tl.int64) * N
    base = qkv + start * stride_t + head * stride_h
    dbase = dqkv + start * stride_dt + head * stride_dh
    out += start * stride_o + head * D
    dout += start * stride_o + head * D
    lse += head * tokens + start
    delta += head * tokens + start
    tables = (sin, cos, prefix, stride_s)
    log2_scale = scale * LOG2E

    # disable_licm: what does not depend on the block would be lifted out of both outer loops and
    # hold registers that the inner loops need: 16 bytes spilled at D = 64, 336 at D = 128 (sm_90)
    for row0 in tl.range(0, N, DQ_M, disable_licm=True):
        rows = row0 + tl.arange(0, DQ_M)
        q1, q2 = load_turned(base, tables, rows, N, stride_t, HALF, ROTATE, INTERLEAVED, True)
        do, row_delta = _load_delta(out, dout, rows, N, stride_o, D)
        tl.store(delta + rows, row_delta, mask=rows < N)  # the second pass reads it
        lse2 = tl.load(lse + rows, mask=rows < N, other=float("inf")) * LOG2E
        r = (N - 1) % DQ_N + 1
        zero = tl.zeros([DQ_M, HALF], tl.float32)
        kr1, kr2, vr = load_keys(
            base, tables, tl.arange(0, DQ_R), r, stride_t, stride_p, D, ROTATE, INTERLEAVED, True
        )
        dq1, dq2 = _add_keys(
            q1, q2, do, lse2, row_delta, kr1, kr2, vr, zero, zero, r, log2_scale, DOT
        )
        for key0 in tl.range(r, N, DQ_N, num_stages=STAGES):
            k1, k2, v = load_keys(
                base, tables, key0 + tl.arange(0, DQ_N), N, stride_t, stride_p,
                D, ROTATE, INTERLEAVED, PREFIX_IN_LOOP,
            )  # fmt: skip
            dq1, dq2 = _add_keys(
                q1, q2, do, lse2, row_delta, k1, k2, v, dq1, dq2, None, log2_scale, DOT
            )
        store_turned_back(
            dbase, dq1 * scale, dq2 * scale, tables, rows, N, stride_dt, HALF, ROTATE, INTERLEAVED
        )

    tl.debug_barrier()  # delta was written by other threads of this program
    for key0 in tl.range(0, N, DKV_N, disable_licm=True):
        keys = key0 + tl.arange(0, DKV_N)
        kb1, kb2, vb = load_keys(
            base, tables, keys, N, stride_t, stride_p, D, ROTATE, INTERLEAVED, True
        )
        r = (N - 1) % DKV_M + 1
        zero = tl.zeros([DKV_N, HALF], tl.float32)
        dv = tl.zeros([DKV_N, D], tl.float32)
        qr1, qr2, dor, lser, deltar = _load_queries(
            base, tables, dout, lse, delta, tl.arange(0, DKV_R), r, stride_t, stride_o,
            D, ROTATE, INTERLEAVED, True,
        )  # fmt: skip
        dk1, dk2, dv = _add_queries(
            kb1, kb2, vb, qr1, qr2, dor, lser, deltar, zero, zero, dv, log2_scale, DOT
        )
        for row0 in tl.range(r, N, DKV_M, num_stages=STAGES):
            q1, q2, do, lse2, row_delta = _load_queries(
                base, tables, dout, lse, delta, row0 + tl.arange(0, DKV_M), N, stride_t, stride_o,
                D, ROTATE, INTERLEAVED, PREFIX_IN_LOOP,
            )  # fmt: skip
            dk1, dk2, dv = _add_queries(
                kb1, kb2, vb, q1, q2, do, lse2, row_delta, dk1, dk2, dv, log2_scale, DOT
            )
        _store_key_gradients(
            dbase, tables, dk1 * scale, dk2 * scale, dv, keys, N, stride_dt, stride_dp,
            D, ROTATE, INTERLEAVED,
        )  # fmt: skip


def backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, packing: Packing, scale: float
) -> Tensor:
    """d(qkv) [T, 3, H, D] from d(out) [T, H, D]; one launch per group."""
    qkv = unit_stride(qkv)
    dout = dout.contiguous()
    tokens, _, heads, width = qkv.shape
    dqkv = qkv.new_empty(qkv.shape)
    choice = launch.rope_attention(qkv.device, width)
    with on_device(qkv):
        delta = lse.new_empty(lse.shape)
        for run in runs(packing, qkv):
            kernel, tiles, options = _plan(choice, run.length, packing.prefix)
            kernel[(run.images * heads,)](
                qkv, run.sin, run.cos, out, dout, lse, delta, dqkv,
                scale, run.length, packing.prefix, heads, run.token0, tokens,
                *qkv.stride()[:3], *dqkv.stride()[:3], run.sin.stride(0), out.stride(0),
                D=width, ROTATE=run.rotated, INTERLEAVED=packing.interleaved,
                DOT=dot_dtype(qkv.dtype), **tiles, **options,
            )  # fmt: skip
    return dqkv


def _plan(
    choice: launch.RopeAttentionLaunch, length: int, prefix: int
) -> tuple[Callable, dict, dict]:
    """Which kernel, its tiles, and its launch options for sequences of one length."""
    if length <= launch.ONE_TILE:
        return (
            _rope_attention_backward_one_tile_kernel,
            {"BLOCK": launch.ONE_TILE},
            {"num_warps": choice.one_tile_warps, "num_stages": 1},
        )
    dq_m, dq_n, dkv_m, dkv_n, warps, stages = choice.two_pass
    dq_remainder, dkv_remainder = front_remainder(length, dq_n), front_remainder(length, dkv_m)
    tiles = {"DQ_M": dq_m, "DQ_N": dq_n, "DKV_M": dkv_m, "DKV_N": dkv_n, "STAGES": stages}
    tiles |= {"DQ_R": padded(dq_remainder), "DKV_R": padded(dkv_remainder)}
    tiles["PREFIX_IN_LOOP"] = prefix > min(dq_remainder, dkv_remainder)
    return (
        _rope_attention_backward_two_pass_kernel,
        tiles,
        {"num_warps": warps, "num_stages": stages},
    )


def configurations() -> Iterator[launch.KernelBuild]:
    """The backward kernels of every launch table."""
    yield from launch.attention_builds(_plan)
