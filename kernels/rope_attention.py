"""Attention with rotary positions, straight from the qkv projection's layout and back into it. No atomics.

Shapes: qkv and d(qkv) [T, 3, H, D], out and d(out) [T, H, D], lse [H, T] (natural logarithm), sin and cos [P, D].
T packs the tokens of all crops; one launch covers `count` images of N tokens each.

Rotation in registers. Rotary positions turn the channel pair (k, k + D/2). The two halves of a row are loaded as two
[rows, D/2] tiles x1, x2, turned to x1 c - x2 s, x2 c + x1 s in float32 and rounded once; a score tile is then
dot(q1, k1') + dot(q2, k2'): as many tensor-core instructions as one product over D, no shuffle, no shared memory. The
gradient accumulates the halves apart and turns them back in the epilogue. Rows before `prefix` read the identity.

Tiles. A length that is no multiple of the block puts its remainder into the FIRST tile (rows 0 .. N mod block, padded to
16, 32 or 64 rows and masked): it initialises the running maximum, so the loop over whole blocks carries no mask and a
score costs one FFMA and one exp2. Counted in the sm_90 binary of a 128 x 128 loop: 846 -> 603 instructions.

Forms, with the bytes each must move (bfloat16, n = images * N * H * D):
    forward      N <= 320: one program per (image, head), rotated keys and values stay on chip          8 n
                 else: one program per (query tile, image, head), online softmax over key tiles         8 n + L2
    backward     N <= 64: one program per (image, head), one tile, five products                       16 n
                 else: one program per (image, head); first dq over query blocks (storing the row sums
                 of out * d(out) on the way), then dk, dv over key blocks                                16 n + L2
    split, merge the rotation alone, for lengths that are better left to the vendor's attention         12 n

Scores, softmax statistics and accumulators are float32; probabilities and score gradients are rounded to the input
dtype before their second product, as in FlashAttention (Dao 2023, arXiv:2307.08691).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov3core.kernels.rope import load_rows, load_turned, store_turned_back
from dinov3core.kernels.tiles import LN2, LOG2E, dot_dtype, front_remainder, padded


@triton.jit
def scores(q1, q2, k1, k2, DOT: tl.constexpr):
    partial = tl.dot(q1.to(DOT), tl.trans(k1.to(DOT)))
    return tl.dot(q2.to(DOT), tl.trans(k2.to(DOT)), partial)


@triton.jit
def _forward_resident(
    qkv, sin, cos, out, lse, scale, N, prefix, H, token0, tokens, stride_t, stride_p, stride_h, stride_s, stride_o,
    D: tl.constexpr, R: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK_M: tl.constexpr,
    ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One (image, head): the N = r + A + B keys stay on chip (r <= R; A, B whole), every query tile sees them at once."""
    HALF: tl.constexpr = D // 2
    pid = tl.program_id(0)
    head = pid % H
    start = token0 + (pid // H).to(tl.int64) * N
    base = qkv + start * stride_t + head * stride_h
    r = N - A - B
    rows_r = tl.arange(0, R)
    kr1, kr2 = load_turned(
        base + stride_p, sin, cos, rows_r, r, prefix, stride_t, stride_s, HALF, ROTATE, INTERLEAVED, True
    )
    vr = load_rows(base + 2 * stride_p, rows_r, r, stride_t, D, True)
    if A > 0:
        rows_a = r + tl.arange(0, A)
        ka1, ka2 = load_turned(
            base + stride_p, sin, cos, rows_a, N, prefix, stride_t, stride_s, HALF, ROTATE, INTERLEAVED, True
        )
        va = load_rows(base + 2 * stride_p, rows_a, N, stride_t, D, False)
    if B > 0:
        rows_b = r + A + tl.arange(0, B)
        kb1, kb2 = load_turned(
            base + stride_p, sin, cos, rows_b, N, prefix, stride_t, stride_s, HALF, ROTATE, INTERLEAVED, True
        )
        vb = load_rows(base + 2 * stride_p, rows_b, N, stride_t, D, False)
    log2_scale = scale * LOG2E
    for row0 in tl.range(0, N, BLOCK_M):
        rows = row0 + tl.arange(0, BLOCK_M)
        q1, q2 = load_turned(
            base, sin, cos, rows, N, prefix, stride_t, stride_s, HALF, ROTATE, INTERLEAVED, True
        )
        sr = tl.where((rows_r < r)[None, :], scores(q1, q2, kr1, kr2, DOT), float("-inf"))
        m = tl.max(sr, 1)
        if A > 0:
            sa = scores(q1, q2, ka1, ka2, DOT)
            m = tl.maximum(m, tl.max(sa, 1))
        if B > 0:
            sb = scores(q1, q2, kb1, kb2, DOT)
            m = tl.maximum(m, tl.max(sb, 1))
        m = m * log2_scale
        pr = tl.math.exp2(sr * log2_scale - m[:, None])
        total = tl.sum(pr, 1)
        acc = tl.dot(pr.to(vr.dtype).to(DOT), vr.to(DOT))
        if A > 0:
            pa = tl.math.exp2(sa * log2_scale - m[:, None])
            total += tl.sum(pa, 1)
            acc = tl.dot(pa.to(va.dtype).to(DOT), va.to(DOT), acc)
        if B > 0:
            pb = tl.math.exp2(sb * log2_scale - m[:, None])
            total += tl.sum(pb, 1)
            acc = tl.dot(pb.to(vb.dtype).to(DOT), vb.to(DOT), acc)
        at = out + (start + rows).to(tl.int64)[:, None] * stride_o + head * D + tl.arange(0, D)[None, :]
        tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=(rows < N)[:, None])
        tl.store(lse + head * tokens + start + rows, (m + tl.math.log2(total)) * LN2, mask=rows < N)


@triton.jit
def _attend_tile(q1, q2, k1, k2, v, m, total, acc, log2_scale, DOT: tl.constexpr):
    """One step of the online softmax over a tile of whole keys."""
    s = scores(q1, q2, k1, k2, DOT)
    m_new = tl.maximum(m, tl.max(s, 1) * log2_scale)
    p = tl.math.exp2(s * log2_scale - m_new[:, None])
    shrink = tl.math.exp2(m - m_new)
    acc = tl.dot(p.to(v.dtype).to(DOT), v.to(DOT), acc * shrink[:, None])
    return m_new, total * shrink + tl.sum(p, 1), acc


@triton.jit
def _forward_stream(
    qkv, sin, cos, out, lse, scale, N, prefix, H, token0, tokens, stride_t, stride_p, stride_h, stride_s, stride_o,
    D: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    PREFIX_IN_LOOP: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One query tile of one (image, head); the remainder keys start the softmax, whole key tiles stream after them."""
    HALF: tl.constexpr = D // 2
    tiles = tl.cdiv(N, BLOCK_M)
    pid = tl.program_id(0)
    head = (pid // tiles) % H
    start = token0 + (pid // (tiles * H)).to(tl.int64) * N
    base = qkv + start * stride_t + head * stride_h
    log2_scale = scale * LOG2E
    rows = (pid % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    q1, q2 = load_turned(base, sin, cos, rows, N, prefix, stride_t, stride_s, HALF, ROTATE, INTERLEAVED, True)
    r = (N - 1) % BLOCK_N + 1
    keys = tl.arange(0, R)
    k1, k2 = load_turned(
        base + stride_p, sin, cos, keys, r, prefix, stride_t, stride_s, HALF, ROTATE, INTERLEAVED, True
    )
    v = load_rows(base + 2 * stride_p, keys, r, stride_t, D, True)
    s = tl.where((keys < r)[None, :], scores(q1, q2, k1, k2, DOT) * log2_scale, float("-inf"))
    m = tl.max(s, 1)
    p = tl.math.exp2(s - m[:, None])
    total = tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype).to(DOT), v.to(DOT))
    for key0 in tl.range(r, N, BLOCK_N, num_stages=STAGES):
        keys = key0 + tl.arange(0, BLOCK_N)
        k1, k2 = load_turned(
            base + stride_p, sin, cos, keys, N, prefix, stride_t, stride_s, HALF, ROTATE, INTERLEAVED, PREFIX_IN_LOOP
        )
        v = load_rows(base + 2 * stride_p, keys, N, stride_t, D, False)
        m, total, acc = _attend_tile(q1, q2, k1, k2, v, m, total, acc, log2_scale, DOT)
    at = out + (start + rows).to(tl.int64)[:, None] * stride_o + head * D + tl.arange(0, D)[None, :]
    tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=(rows < N)[:, None])
    tl.store(lse + head * tokens + start + rows, (m + tl.math.log2(total)) * LN2, mask=rows < N)
