"""Attention with rotary positions, straight from the layout of the qkv projection. No atomics.

Shapes: qkv and d(qkv) [T, 3, H, D], out and d(out) [T, H, D], lse [H, T] (natural logarithm), sin
and cos [P, D]. T packs the tokens of all crops; one launch covers the images of one length N.

Rotation in registers. Rotary positions turn the channel pair (k, k + D/2). The two halves of a row
are loaded as two [rows, D/2] tiles x1, x2, turned to x1 c - x2 s, x2 c + x1 s in float32 and
rounded once; a score tile is then dot(q1, k1') + dot(q2, k2'): as many tensor-core instructions as
one product over D, no shuffle, no shared memory. The gradient accumulates the halves apart and
turns them back in the epilogue. Rows before `prefix` read the identity.

Tiles. A length that is no multiple of the block puts its remainder into the FIRST tile (rows 0 .. N
mod block, padded to 16, 32 or 64 rows and masked): it initialises the running maximum, so the loop
over whole blocks carries no mask and a score costs one FFMA and one exp2 (sm_90, D = 64: 360
instructions per warp for 128 x 64 scores, rotation included).

Forms, with the bytes each must move (bfloat16, n = images * N * H * D):
    resident      8 n       N <= resident_keys of the launch table: one program per (image, head),
                            rotated keys and values stay on chip
    stream        8 n + L2  longer: one program per (query tile, image, head), online softmax over
                            key tiles
    backward
      one tile   16 n       N <= 64: one program per (image, head), five products
      two pass   16 n + L2  longer: one program per (image, head); first dq over query blocks
                            (storing the row sums of out * d(out) on the way), then dk, dv over key
                            blocks
    split, merge 12 n       the rotation alone (rope.py), for lengths that are better left to the
                            vendor's attention

Scores, softmax statistics and accumulators are float32; probabilities and score gradients are
rounded to the input dtype before their second product, as in FlashAttention (Dao 2023,
arXiv:2307.08691).
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov3core.kernels import launch, rope
from dinov3core.kernels.rope import Packing, load_rows, load_turned, runs
from dinov3core.kernels.tiles import (
    EXACT,
    LN2,
    LOG2E,
    dot_dtype,
    front_remainder,
    on_device,
    padded,
    unit_stride,
)


@triton.jit
def scores(q1, q2, k1, k2, DOT: tl.constexpr):
    """q k' from the halves."""
    first = tl.dot(q1.to(DOT), tl.trans(k1.to(DOT)), input_precision=EXACT)
    return tl.dot(q2.to(DOT), tl.trans(k2.to(DOT)), first, input_precision=EXACT)


@triton.jit
def _softmax_step(q1, q2, k1, k2, v, m, total, acc, log2_scale, real_keys, DOT: tl.constexpr):
    """One tile of keys into the online softmax (base 2) of a tile of queries.

    m: running maximum of the scaled scores; total: sum of their powers relative to it; acc: the
    same sum weighted with v. `real_keys`: how many keys of a padded tile exist, None when whole.
    """
    s = scores(q1, q2, k1, k2, DOT)
    if real_keys is not None:
        s = tl.where((tl.arange(0, k1.shape[0]) < real_keys)[None, :], s, float("-inf"))
    # The scale enters behind the maximum, so that a score costs one multiply-add and one exp2.
    m_new = tl.maximum(m, tl.max(s, 1) * log2_scale)
    p = tl.math.exp2(s * log2_scale - m_new[:, None])
    shrink = tl.math.exp2(m - m_new)  # 0 in the first step, where m is -inf
    shrunk = acc * shrink[:, None]
    # p is rounded for the product but summed as it is: the sum is what the division needs
    acc = tl.dot(p.to(v.dtype).to(DOT), v.to(DOT), shrunk, input_precision=EXACT)
    return m_new, total * shrink + tl.sum(p, 1), acc


@triton.jit
def _store_output(out, lse, m, total, acc, rows, N, stride_o, D: tl.constexpr):
    """Finished query rows, and the natural log-sum-exp of their scores for the backward."""
    at = out + rows[:, None] * stride_o + tl.arange(0, D)[None, :]
    tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=(rows < N)[:, None])
    tl.store(lse + rows, (m + tl.math.log2(total)) * LN2, mask=rows < N)


@triton.jit
def load_keys(
    base, tables, keys, limit, stride_t, stride_p,
    D: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rotated halves of k rows, and v rows, of one head."""
    k1, k2 = load_turned(
        base + stride_p, tables, keys, limit, stride_t, D // 2, ROTATE, INTERLEAVED, MASKED
    )
    return k1, k2, load_rows(base + 2 * stride_p, keys, limit, stride_t, D, MASKED)


@triton.jit(do_not_specialize=["N", "prefix", "H", "token0", "tokens"])
def _rope_attention_resident_kernel(
    qkv, sin, cos, out, lse, scale, N, prefix, H, token0, tokens,
    stride_t, stride_p, stride_h, stride_s, stride_o,
    D: tl.constexpr, R: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK_M: tl.constexpr,
    ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One (image, head): all N = r + A + B keys are rotated once and stay on chip.

    A and B are whole tiles, R >= r is padded.
    """
    head = tl.program_id(0) % H
    start = token0 + (tl.program_id(0) // H).to(tl.int64) * N  # int64: all offsets derive from it
    base = qkv + start * stride_t + head * stride_h
    tables = (sin, cos, prefix, stride_s)
    r = N - A - B
    # `limit` is r, not N: the padded rows of this tile are keys of the next one
    kr1, kr2, vr = load_keys(
        base, tables, tl.arange(0, R), r, stride_t, stride_p, D, ROTATE, INTERLEAVED, True
    )
    # A and B are whole, but the prefix may reach into them: MASKED guards the table rows
    if A > 0:
        ka1, ka2, va = load_keys(
            base, tables, r + tl.arange(0, A), N, stride_t, stride_p, D, ROTATE, INTERLEAVED, True
        )
    if B > 0:
        kb1, kb2, vb = load_keys(
            base, tables, r + A + tl.arange(0, B), N, stride_t, stride_p,
            D, ROTATE, INTERLEAVED, True,
        )  # fmt: skip

    log2_scale = scale * LOG2E
    for row0 in tl.range(0, N, BLOCK_M):
        rows = row0 + tl.arange(0, BLOCK_M)
        q1, q2 = load_turned(base, tables, rows, N, stride_t, D // 2, ROTATE, INTERLEAVED, True)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, D], tl.float32)
        m, total, acc = _softmax_step(q1, q2, kr1, kr2, vr, m, total, acc, log2_scale, r, DOT)
        if A > 0:
            m, total, acc = _softmax_step(
                q1, q2, ka1, ka2, va, m, total, acc, log2_scale, None, DOT
            )
        if B > 0:
            m, total, acc = _softmax_step(
                q1, q2, kb1, kb2, vb, m, total, acc, log2_scale, None, DOT
            )
        _store_output(
            out + start * stride_o + head * D, lse + head * tokens + start,
            m, total, acc, rows, N, stride_o, D,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "prefix", "H", "token0", "tokens"])
def _rope_attention_stream_kernel(
    qkv, sin, cos, out, lse, scale, N, prefix, H, token0, tokens,
    stride_t, stride_p, stride_h, stride_s, stride_o,
    D: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, PREFIX_IN_LOOP: tl.constexpr,
    ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One query tile of one (image, head): remainder keys start the softmax, whole tiles follow."""
    tiles = tl.cdiv(N, BLOCK_M)
    pid = tl.program_id(0)
    # query tiles of a head run side by side, so that its keys are read from L2 after the first
    head = (pid // tiles) % H
    start = token0 + (pid // (tiles * H)).to(tl.int64) * N
    base = qkv + start * stride_t + head * stride_h
    tables = (sin, cos, prefix, stride_s)
    log2_scale = scale * LOG2E
    rows = (pid % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    q1, q2 = load_turned(base, tables, rows, N, stride_t, D // 2, ROTATE, INTERLEAVED, True)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)

    r = (N - 1) % BLOCK_N + 1
    kr1, kr2, vr = load_keys(
        base, tables, tl.arange(0, R), r, stride_t, stride_p, D, ROTATE, INTERLEAVED, True
    )
    m, total, acc = _softmax_step(q1, q2, kr1, kr2, vr, m, total, acc, log2_scale, r, DOT)
    for key0 in tl.range(r, N, BLOCK_N, num_stages=STAGES):
        k1, k2, v = load_keys(
            base, tables, key0 + tl.arange(0, BLOCK_N), N, stride_t, stride_p,
            D, ROTATE, INTERLEAVED, PREFIX_IN_LOOP,
        )  # fmt: skip
        m, total, acc = _softmax_step(q1, q2, k1, k2, v, m, total, acc, log2_scale, None, DOT)
    _store_output(
        out + start * stride_o + head * D, lse + head * tokens + start,
        m, total, acc, rows, N, stride_o, D,
    )  # fmt: skip


def problem(
    device: torch.device, dtype: torch.dtype, width: int, table: torch.dtype | None
) -> str | None:
    """Why these kernels, forward and backward, do not take such inputs, or None."""
    if (reason := rope.problem(dtype, width, table)) is not None:
        return reason
    if launch.rope_attention(device, width) is None:
        return (
            f"no spill-free tiles are known for {launch.architecture(device)} at head width {width}"
        )
    return None


def forward(qkv: Tensor, packing: Packing, scale: float) -> tuple[Tensor, Tensor]:
    """out [T, H, D] and lse [H, T] of qkv [T, 3, H, D]; one launch per group."""
    qkv = unit_stride(qkv)
    tokens, _, heads, width = qkv.shape
    out = qkv.new_empty(tokens, heads, width)
    lse = qkv.new_empty(heads, tokens, dtype=torch.float32)
    choice = launch.rope_attention(qkv.device, width)
    with on_device(qkv):
        for run in runs(packing, qkv):
            kernel, tiles, options = _plan(choice, run.length, packing.prefix)
            programs = run.images * heads
            if kernel is _rope_attention_stream_kernel:
                programs *= triton.cdiv(run.length, tiles["BLOCK_M"])
            kernel[(programs,)](
                qkv, run.sin, run.cos, out, lse,
                scale, run.length, packing.prefix, heads, run.token0, tokens,
                *qkv.stride()[:3], run.sin.stride(0), out.stride(0),
                D=width, ROTATE=run.rotated, INTERLEAVED=packing.interleaved,
                DOT=dot_dtype(qkv.dtype), **tiles, **options,
            )  # fmt: skip
    return out, lse


def _plan(
    choice: launch.RopeAttentionLaunch, length: int, prefix: int
) -> tuple[Callable, dict, dict]:
    """Which kernel, its tiles, and its launch options for sequences of one length."""
    if (resident := launch.resident_tiles(length, choice.resident_keys)) is not None:
        tiles = dict(zip("RAB", resident, strict=True), BLOCK_M=launch.RESIDENT_BLOCK)
        options = {"num_warps": choice.resident_warps, "num_stages": 1}
        return _rope_attention_resident_kernel, tiles, options
    block_m, block_n, warps, stages = choice.stream
    remainder = front_remainder(length, block_n)
    tiles = {"R": padded(remainder), "BLOCK_M": block_m, "BLOCK_N": block_n, "STAGES": stages}
    tiles["PREFIX_IN_LOOP"] = prefix > remainder
    return _rope_attention_stream_kernel, tiles, {"num_warps": warps, "num_stages": stages}


def configurations() -> Iterator[launch.KernelBuild]:
    """The forward kernels of every launch table."""
    yield from launch.attention_builds(_plan)
