"""Residuals of two Gram matrices tile by tile: neither N x N matrix of similarities ever reaches
memory.

Shapes: G images, N rows each, Ds and Dt channels; student [G, N, Ds], teacher [G, N, Dt] of any
image and row stride, 1 / norm of every row in float32 (or no normalisation).

    residual  E = S S' - T T' tile by tile in two float32 accumulators, with clamps; the sum of
              squares per tile, and, for the gradient, E times the student's 1 / norm per column, in
              the dtype of the student
    gradient  dS = 4 / entries * (E / norm) student, a batched product of the vendor's library, then
    project   through the normalisation: (g - s <s, g>) / norm, in place

Only tiles on and above the diagonal are computed (E is symmetric, a tile stands for its mirror): 2
N^2 D products per
pair of Grams instead of 4. Dot products are taken of the raw rows and scaled afterwards in float32:
rounding normalised rows to bfloat16 first would leave a loss 9 % wrong when the student is close to
the teacher, this leaves it 6e-7. Float32 rows, which is what the final norm gives under autocast,
are multiplied in three TensorFloat-32 products: one would leave the loss 9 % and the gradient 29 %
wrong at a student-teacher distance of 1e-3 (tiles.dot_precision). A residual of 2 N^2 bytes per
image is kept for the images of one slab only; where a single image is larger, rows of it.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov3core.kernels import launch
from dinov3core.kernels.tiles import dot_dtype, dot_precision, on_device, unit_stride

SLAB_BYTES = (
    1 << 28
)  # of stored residual; 768 px ViT-L crops of 64 images would take 1.4 GB at once


@triton.jit
def upper_tile(tile, count):
    """Row and column (row <= column) of the tile-th tile of the upper triangle of count x count
    tiles, row by row.
    """
    turn = (2 * count + 1).to(tl.float32)
    row = ((turn - tl.sqrt(turn * turn - 8.0 * tile.to(tl.float32))) * 0.5).to(tl.int32)
    row = tl.where(row * (2 * count - row + 1) // 2 > tile, row - 1, row)  # the root was rounded up
    row = tl.where((row + 1) * (2 * count - row) // 2 <= tile, row + 1, row)  # or down
    return row, tile - row * (2 * count - row + 1) // 2 + row


@triton.jit
def _similarity(
    x, norms, rows, columns, N, D, stride, NORMALIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Dot products of some rows of one image with some others, scaled after the product."""
    in_rows, in_columns = rows < N, columns < N
    acc = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    at_rows = x + rows.to(tl.int64)[:, None] * stride
    at_columns = x + columns.to(tl.int64)[:, None] * stride
    for d0 in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        d = d0 + tl.arange(0, BLOCK_D)
        a = tl.load(at_rows + d[None, :], mask=in_rows[:, None] & (d < D)[None, :], other=0.0).to(
            DOT
        )
        b = tl.load(
            at_columns + d[None, :], mask=in_columns[:, None] & (d < D)[None, :], other=0.0
        ).to(DOT)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    if NORMALIZE:
        acc *= tl.load(norms + rows, mask=in_rows, other=0.0)[:, None]
        acc *= tl.load(norms + columns, mask=in_columns, other=0.0)[None, :]
    return acc


@triton.jit(do_not_specialize=["first", "last", "tiles", "count"])
def _residual(
    student, teacher, student_norms, teacher_norms, squares, residual, N, D_student, D_teacher, first, last, tiles,
    count, stride_image_s, stride_s, stride_image_t, stride_t,
    TRIANGLE: tl.constexpr, CLIP: tl.constexpr, CLIP_TEACHER: tl.constexpr, NORMALIZE: tl.constexpr,
    STORE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One of an image's `count` tiles: rows first .. last against all, or the upper triangle."""
    tile = tl.program_id(0) % count
    image = (tl.program_id(0) // count).to(tl.int64)
    if TRIANGLE:
        row, column = upper_tile(tile, tiles)
    else:
        row, column = tile // tiles, tile % tiles
    rows = first + row * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    norms = student_norms + image * N
    s = _similarity(
        student + image * stride_image_s, norms, rows, columns, N, D_student, stride_s,
        NORMALIZE, BLOCK_N, BLOCK_D, DOT, PRECISION, STAGES,
    )  # fmt: skip
    t = _similarity(
        teacher + image * stride_image_t, teacher_norms + image * N, rows, columns, N, D_teacher, stride_t,
        NORMALIZE, BLOCK_N, BLOCK_D, DOT, PRECISION, STAGES,
    )  # fmt: skip
    if CLIP_TEACHER:
        t = tl.maximum(t, 0.0)
    e = (tl.maximum(s, 0.0) if CLIP else s) - t
    e = tl.where((rows < last)[:, None], e, 0.0)
    if TRIANGLE:
        twice = tl.where(row == column, 1.0, 2.0)
    else:
        twice = 1.0
    tl.store(squares + image * count + tile, twice * tl.sum(e * e))
    if STORE:
        if CLIP:
            e = tl.where(s > 0, e, 0.0)
        in_rows, in_columns = rows < last, columns < N
        base = residual + image * (last - first) * N
        by_row, by_column = e, e
        if NORMALIZE:
            by_column = e * tl.load(norms + columns, mask=in_columns, other=0.0)[None, :]
            by_row = e * tl.load(norms + rows, mask=in_rows, other=0.0)[:, None]
        at = base + (rows - first).to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(
            at, by_column.to(residual.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :]
        )
        if TRIANGLE:
            if row != column:
                mirror = base + columns.to(tl.int64)[:, None] * N + rows[None, :]
                mirrored = tl.trans(by_row).to(residual.dtype.element_ty)
                tl.store(mirror, mirrored, mask=in_columns[:, None] & in_rows[None, :])


@triton.jit
def _project(
    x, norms, gradient, rows_per_image, D, factor, stride_image, stride, NORMALIZE: tl.constexpr, EPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """factor * gradient of one unit row, turned in place into that of the row: (g - s <s, g>) /
    norm.
    """
    image = (tl.program_id(0) // rows_per_image).to(tl.int64)
    row = tl.program_id(0) % rows_per_image
    at = gradient + (image * rows_per_image + row) * D
    start = x + image * stride_image + row.to(tl.int64) * stride
    inverse = tl.load(norms + image * rows_per_image + row) if NORMALIZE else 1.0
    radial = 0.0
    if NORMALIZE:
        acc = tl.zeros([BLOCK_D], tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            s = tl.load(start + d, mask=d < D, other=0.0).to(tl.float32) * inverse
            acc += s * tl.load(at + d, mask=d < D, other=0.0)
        radial = tl.where(
            inverse < 1.0 / EPS, tl.sum(acc, 0), 0.0
        )  # below the floor, dividing is only scaling
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        s = tl.load(start + d, mask=d < D, other=0.0).to(tl.float32) * inverse
        g = tl.load(at + d, mask=d < D, other=0.0)
        tl.store(at + d, (g - s * radial) * (inverse * factor), mask=d < D)


def loss(
    student: Tensor,
    teacher: Tensor,
    normalize: bool,
    negatives: str,
    with_gradient: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Mean squared residual, and its gradient [G, N, Ds] in float32 (empty without
    `with_gradient`).
    """
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    student, teacher = unit_stride(student.to(dtype)), unit_stride(teacher.to(dtype))
    G, N, D = student.shape
    norms = tuple(
        _inverse_norms(x, eps) if normalize else x.new_empty(0, dtype=torch.float32)
        for x in (student, teacher)
    )
    gradient = student.new_empty(student.shape if with_gradient else 0, dtype=torch.float32)
    narrow = student.dtype if student.dtype == torch.bfloat16 else torch.float32
    squares, entries = [student.new_zeros(1, dtype=torch.float32)], max(1, G * N * N)
    for images, first, last in _slabs(G, N, narrow.itemsize if with_gradient else 0):
        slab, slab_norms = (
            (student[images], teacher[images]),
            tuple(n[images] for n in norms) if normalize else norms,
        )
        room = (
            student.new_empty(slab[0].shape[0], last - first, N, dtype=narrow)
            if with_gradient
            else student
        )
        squares.append(
            _launch(*slab, *slab_norms, room, first, last, negatives, normalize, with_gradient)
        )
        if with_gradient:
            gradient[images, first:last] = _product(room, slab[0].to(narrow))
    if with_gradient and gradient.numel():
        with on_device(student):
            _project[(G * N,)](
                student, norms[0], gradient, N, D, 4.0 / entries, student.stride(0), student.stride(1),
                NORMALIZE=normalize, EPS=eps, BLOCK_D=min(1024, triton.next_power_of_2(D)), num_warps=4,
            )  # fmt: skip
    return torch.cat(squares).sum() / entries, gradient


def _inverse_norms(x: Tensor, eps: float) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).clamp_(min=eps).reciprocal_()


def _slabs(G: int, N: int, itemsize: int) -> Iterator[tuple[slice, int, int]]:
    """Images at a time, and rows of them, so that a stored residual stays below SLAB_BYTES."""
    if N == 0:
        return
    budget = SLAB_BYTES // itemsize if itemsize else G * N * N
    images = max(1, min(G, budget // (N * N)))
    rows = N if images * N * N <= budget else max(128, budget // N // 128 * 128)
    for image in range(0, G, images):
        for first in range(0, N, rows):
            yield slice(image, min(image + images, G)), first, min(first + rows, N)


def _launch(
    student,
    teacher,
    student_norms,
    teacher_norms,
    room,
    first,
    last,
    negatives,
    normalize,
    with_gradient,
) -> Tensor:
    G, N, D = student.shape
    triangle = first == 0 and last == N
    target = launch.architecture(student.device)
    choice = launch.gram(target, student.dtype, N)
    tiles, rows = triton.cdiv(N, choice.rows), triton.cdiv(last - first, choice.rows)
    count = tiles * (tiles + 1) // 2 if triangle else rows * tiles
    squares = student.new_empty(G, count, dtype=torch.float32)
    with on_device(student):
        _residual[(count * G,)](
            student, teacher, student_norms, teacher_norms, squares, room, N, D, teacher.shape[2], first, last, tiles,
            count, *student.stride()[:2], *teacher.stride()[:2],
            **_constants(choice, student.dtype, target, negatives),
            TRIANGLE=triangle, NORMALIZE=normalize, STORE=with_gradient, **_options(choice),
        )  # fmt: skip
    return squares.flatten()


def _constants(
    choice: launch.GramLaunch,
    dtype: torch.dtype,
    target: str,
    negatives: str,
) -> dict[str, Any]:
    """Compile-time arguments of `_residual` that follow from the launch choice and the inputs."""
    return {
        "CLIP": negatives == "clip",
        "CLIP_TEACHER": negatives != "keep",
        "BLOCK_N": choice.rows,
        "BLOCK_D": choice.channels,
        "DOT": dot_dtype(dtype),
        "PRECISION": dot_precision(dtype, target),
        "STAGES": choice.stages,
    }


def _options(choice: launch.GramLaunch) -> dict[str, int]:
    return {"num_warps": choice.warps, "num_stages": choice.stages}


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32; narrow operands are not rounded again on the way out."""
    return (
        torch.bmm(a, b, out_dtype=torch.float32)
        if a.is_cuda and a.dtype != torch.float32
        else a.float() @ b.float()
    )


def CONFIGURATIONS() -> Iterator[launch.KernelBuild]:
    """Training's float32 rows and bfloat16 ones, at the tiles of every length, kept or clamped.

    196 patches (224 px) are no multiple of 16: the residual is then stored in narrow pieces.
    """
    shapes = (("keep", 196), ("keep", 1024), ("clip", 1024))
    for target in launch.ARCHITECTURES:
        choices = set()
        for dtype, (negatives, N) in itertools.product((torch.float32, torch.bfloat16), shapes):
            choice = launch.gram(target, dtype, N)
            if (dtype, negatives, choice) in choices:
                continue
            choices.add((dtype, negatives, choice))
            yield _describe_residual(choice, dtype, target, negatives, aligned=N % 16 == 0)
    yield _describe_project(torch.float32)


def _describe_residual(
    choice: launch.GramLaunch, dtype: torch.dtype, target: str, negatives: str, aligned: bool
) -> launch.KernelBuild:
    pointers = [launch.POINTERS[dtype]] * 2 + ["*fp32"] * 3 + [launch.POINTERS[dtype]]
    kinds = pointers + ["i32"] * 11 + ["constexpr"] * 10
    constants = _constants(choice, dtype, target, negatives)
    constants |= {"TRIANGLE": True, "NORMALIZE": True, "STORE": True}
    attrs = [*_residual.arg_names[: len(pointers)], "D_student", "D_teacher"]
    attrs += ["stride_image_s", "stride_s", "stride_image_t", "stride_t"]
    if aligned:
        attrs.append("N")
    clip = "" if negatives == "keep" else f"_{negatives}"
    return launch.KernelBuild(
        f"gram_residual_{launch.POINTERS[dtype][1:]}_{choice.rows}{clip}",
        _residual,
        dict(zip(_residual.arg_names, kinds, strict=True)),
        constants,
        tuple(attrs),
        _options(choice),
        (target,),
    )


def _describe_project(dtype: torch.dtype) -> launch.KernelBuild:
    kinds = [launch.POINTERS[dtype], "*fp32", "*fp32", "i32", "i32", "fp32", "i32", "i32"]
    kinds += ["constexpr"] * 3
    return launch.KernelBuild(
        f"gram_project_{launch.POINTERS[dtype][1:]}",
        _project,
        dict(zip(_project.arg_names, kinds, strict=True)),
        {"NORMALIZE": True, "EPS": 1e-12, "BLOCK_D": 1024},
        ("x", "norms", "gradient", "D", "stride_image", "stride"),
        {"num_warps": 4},
        tensor_cores=False,
    )
