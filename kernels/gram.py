"""Residuals of two Gram matrices tile by tile: no N x N matrix of similarities reaches memory.

Shapes: G images, N rows each, Ds and Dt channels; student [G, N, Ds], teacher [G, N, Dt] of any
image and row stride, 1 / norm of every row in float32 (or no normalisation).

    residual  E = S S' - T T' tile by tile in two float32 accumulators, with clamps; the sum of
              squares per tile, and, for the gradient, E times the student's 1 / norm per column, in
              the dtype of the student
    gradient  dS = 4 / entries * (E / norm) student, a batched product of the vendor's library, then
    project   through the normalisation: (g - s <s, g>) / norm, in place

Only tiles on and above the diagonal are computed (E is symmetric, a tile stands for its mirror):
2 N^2 D products per pair of Grams instead of 4. Dot products are taken of the raw rows and scaled
afterwards in float32: rounding normalised rows to bfloat16 first would leave a loss 9 % wrong when
the student is close to the teacher, this leaves it 6e-7. Float32 rows, which is what the final norm
gives under autocast, are multiplied in three TensorFloat-32 products: one would leave the loss 9 %
and the gradient 29 % wrong at a student-teacher distance of 1e-3 (tiles.dot_precision). A residual
of 2 N^2 bytes per image is stored for the images of one slab only; where a single image is larger,
for some of its rows.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov3core.kernels import launch
from dinov3core.kernels.tiles import dot_dtype, dot_precision, on_device, unit_stride


class Grams(NamedTuple):
    """The two sides of a comparison, with the options that every launch needs.

    Attributes:
        student, teacher: [G, N, D] of one dtype, channels dense.
        student_norms, teacher_norms: 1 / norm of every row [G, N]; None without normalisation.
        negatives: "keep", "clip" or "clip_teacher".
    """

    student: Tensor
    teacher: Tensor
    student_norms: Tensor | None
    teacher_norms: Tensor | None
    negatives: str

    def of_images(self, images: slice) -> "Grams":
        """The same of some images: views."""
        tensors = [None if x is None else x[images] for x in self[:4]]
        return Grams(*tensors, self.negatives)


class Slab(NamedTuple):
    """Rows first .. last of some images: what is computed by one launch."""

    images: slice
    first: int
    last: int


@triton.jit
def upper_tile(tile, count):
    """Row and column (row <= column) of a tile of the upper triangle of count x count tiles.

    Tiles are numbered row by row.
    """
    # row r starts at tile r (2 count - r + 1) / 2: the root of that quadratic, rounded down
    turn = (2 * count + 1).to(tl.float32)
    row = ((turn - tl.sqrt(turn * turn - 8.0 * tile.to(tl.float32))) * 0.5).to(tl.int32)
    row = tl.where(row * (2 * count - row + 1) // 2 > tile, row - 1, row)  # the root was rounded up
    row = tl.where((row + 1) * (2 * count - row) // 2 <= tile, row + 1, row)  # or down
    return row, tile - row * (2 * count - row + 1) // 2 + row


@triton.jit
def _similarity(
    x, norms, rows, columns, N, D, stride,
    NORMALIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Dot products of some rows of one image with some others, scaled after the product."""
    in_rows = rows < N
    in_columns = columns < N
    acc = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    at_rows = x + rows.to(tl.int64)[:, None] * stride
    at_columns = x + columns.to(tl.int64)[:, None] * stride
    for d0 in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        d = d0 + tl.arange(0, BLOCK_D)
        in_width = (d < D)[None, :]
        a = tl.load(at_rows + d[None, :], mask=in_rows[:, None] & in_width, other=0.0)
        b = tl.load(at_columns + d[None, :], mask=in_columns[:, None] & in_width, other=0.0)
        acc = tl.dot(a.to(DOT), tl.trans(b.to(DOT)), acc, input_precision=PRECISION)
    if NORMALIZE:
        acc *= tl.load(norms + rows, mask=in_rows, other=0.0)[:, None]
        acc *= tl.load(norms + columns, mask=in_columns, other=0.0)[None, :]
    return acc


@triton.jit(do_not_specialize=["first", "last", "tiles", "count"])
def _gram_residual_kernel(
    student, teacher, student_norms, teacher_norms, squares, residual,
    N, D_student, D_teacher, first, last, tiles, count,
    stride_image_s, stride_s, stride_image_t, stride_t,
    TRIANGLE: tl.constexpr, CLIP: tl.constexpr, CLIP_TEACHER: tl.constexpr,
    NORMALIZE: tl.constexpr, STORE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One of an image's `count` tiles: rows first .. last against all, or the upper triangle."""
    tile = tl.program_id(0) % count
    image = (tl.program_id(0) // count).to(tl.int64)
    if TRIANGLE:
        tile_row, tile_column = upper_tile(tile, tiles)
    else:
        tile_row = tile // tiles
        tile_column = tile % tiles
    rows = first + tile_row * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tile_column * BLOCK_N + tl.arange(0, BLOCK_N)

    # clamps need S S' and T T' apart, so each has an accumulator of its own
    norms = student_norms + image * N
    s = _similarity(
        student + image * stride_image_s, norms, rows, columns, N, D_student, stride_s,
        NORMALIZE, BLOCK_N, BLOCK_D, DOT, PRECISION, STAGES,
    )  # fmt: skip
    t = _similarity(
        teacher + image * stride_image_t, teacher_norms + image * N,
        rows, columns, N, D_teacher, stride_t,
        NORMALIZE, BLOCK_N, BLOCK_D, DOT, PRECISION, STAGES,
    )  # fmt: skip
    if CLIP_TEACHER:
        t = tl.maximum(t, 0.0)
    e = (tl.maximum(s, 0.0) if CLIP else s) - t
    e = tl.where((rows < last)[:, None], e, 0.0)

    if TRIANGLE:
        twice = tl.where(tile_row == tile_column, 1.0, 2.0)  # a tile stands for its mirror
    else:
        twice = 1.0
    tl.store(squares + image * count + tile, twice * tl.sum(e * e))

    if STORE:
        if CLIP:
            e = tl.where(s > 0, e, 0.0)  # a clamped similarity does not depend on the student
        in_rows = rows < last
        in_columns = columns < N
        base = residual + image * (last - first) * N
        # dS_i = sum over j of E_ij x_j / norm_j: entry (i, j) carries 1 / norm of the row it will
        # be multiplied with, which is j, and its mirror (j, i) that of i
        by_row = e
        by_column = e
        if NORMALIZE:
            by_column = e * tl.load(norms + columns, mask=in_columns, other=0.0)[None, :]
            by_row = e * tl.load(norms + rows, mask=in_rows, other=0.0)[:, None]
        at = base + (rows - first).to(tl.int64)[:, None] * N + columns[None, :]
        stored = by_column.to(residual.dtype.element_ty)
        tl.store(at, stored, mask=in_rows[:, None] & in_columns[None, :])
        if TRIANGLE:
            if tile_row != tile_column:
                mirror = base + columns.to(tl.int64)[:, None] * N + rows[None, :]
                mirrored = tl.trans(by_row).to(residual.dtype.element_ty)
                tl.store(mirror, mirrored, mask=in_columns[:, None] & in_rows[None, :])


@triton.jit
def _gram_project_kernel(
    x, norms, dx, rows_per_image, D, factor, stride_image, stride,
    NORMALIZE: tl.constexpr, EPS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """factor * gradient of one unit row, turned in place into that of the row itself.

    (g - s <s, g>) / norm, as ops.unit_rows.unit_rows_backward.
    """
    image = (tl.program_id(0) // rows_per_image).to(tl.int64)
    row = tl.program_id(0) % rows_per_image
    at = dx + (image * rows_per_image + row) * D
    start = x + image * stride_image + row.to(tl.int64) * stride
    inverse = tl.load(norms + image * rows_per_image + row) if NORMALIZE else 1.0
    radial = 0.0
    if NORMALIZE:
        acc = tl.zeros([BLOCK_D], tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            s = tl.load(start + d, mask=d < D, other=0.0).to(tl.float32) * inverse
            acc += s * tl.load(at + d, mask=d < D, other=0.0)
        # a norm below the floor EPS is not divided by: there the division is only a scaling
        radial = tl.where(inverse < 1.0 / EPS, tl.sum(acc, 0), 0.0)
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
    """Mean squared residual, and dstudent [G, N, Ds] in float32 (empty without `with_gradient`)."""
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    student, teacher = (unit_stride(x.to(dtype)) for x in (student, teacher))
    G, N, _ = student.shape
    norms = (_inverse_norms(x, eps) if normalize else None for x in (student, teacher))
    grams = Grams(student, teacher, *norms, negatives)
    dstudent = student.new_empty(student.shape if with_gradient else 0, dtype=torch.float32)
    narrow = dtype if dtype == torch.bfloat16 else torch.float32

    squares = [student.new_zeros(1, dtype=torch.float32)]
    for slab in slabs(G, N, narrow.itemsize if with_gradient else 0):
        part = grams.of_images(slab.images)
        residual = None
        if with_gradient:
            shape = len(part.student), slab.last - slab.first, N
            residual = student.new_empty(shape, dtype=narrow)
        squares.append(_fill_residual(part, slab, residual))
        if residual is not None:
            dpart = _product(residual, part.student.to(narrow))
            dstudent[slab.images, slab.first : slab.last] = dpart

    entries = max(1, G * N * N)
    if with_gradient and dstudent.numel():
        _project(grams, dstudent, 4.0 / entries, eps)
    return torch.cat(squares).sum() / entries, dstudent


def _inverse_norms(x: Tensor, eps: float) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).clamp_(min=eps).reciprocal_()


def slabs(G: int, N: int, itemsize: int) -> Iterator[Slab]:
    """Images at a time, and rows of them, so that a stored residual stays below GRAM_SLAB_BYTES.

    `itemsize`: bytes of one of its entries; 0: none is stored.
    """
    if N == 0:
        return
    budget = launch.GRAM_SLAB_BYTES // itemsize if itemsize else G * N * N
    images = max(1, min(G, budget // (N * N)))
    step = launch.GRAM_SLAB_ROWS
    rows = N if images * N * N <= budget else max(step, budget // N // step * step)
    for image in range(0, G, images):
        for first in range(0, N, rows):
            yield Slab(slice(image, min(image + images, G)), first, min(first + rows, N))


def _fill_residual(grams: Grams, slab: Slab, residual: Tensor | None) -> Tensor:
    """Sums of squares, one per tile; and the residual [G, last - first, N], where there is one."""
    student, teacher, *norms, negatives = grams
    G, N, D = student.shape
    triangle = slab.first == 0 and slab.last == N
    target = launch.architecture(student.device)
    choice = launch.gram(target, student.dtype, N)
    tiles = triton.cdiv(N, choice.side)
    tile_rows = triton.cdiv(slab.last - slab.first, choice.side)
    count = tiles * (tiles + 1) // 2 if triangle else tile_rows * tiles

    squares = student.new_empty(G, count, dtype=torch.float32)
    pointers = [student if x is None else x for x in (*norms, squares, residual)]
    with on_device(student):
        _gram_residual_kernel[(count * G,)](
            student, teacher, *pointers,
            N, D, teacher.shape[2], slab.first, slab.last, tiles, count,
            *student.stride()[:2], *teacher.stride()[:2],
            **_constants(choice, student.dtype, target, negatives), TRIANGLE=triangle,
            NORMALIZE=norms[0] is not None, STORE=residual is not None, **_options(choice),
        )  # fmt: skip
    return squares.flatten()


def _project(grams: Grams, dstudent: Tensor, factor: float, eps: float) -> None:
    """factor * dstudent through the normalisation, in place."""
    student = grams.student
    norms = grams.student_norms
    G, N, D = student.shape
    channels, warps = launch.GRAM_PROJECT
    with on_device(student):
        _gram_project_kernel[(G * N,)](
            student, dstudent if norms is None else norms, dstudent,
            N, D, factor, student.stride(0), student.stride(1),
            NORMALIZE=norms is not None, EPS=eps,
            BLOCK_D=min(channels, triton.next_power_of_2(D)), num_warps=warps,
        )  # fmt: skip


def _constants(
    choice: launch.GramLaunch, dtype: torch.dtype, target: str, negatives: str
) -> dict[str, Any]:
    """Compile-time arguments of the residual that follow from the launch choice and the inputs."""
    return {
        "CLIP": negatives == "clip",
        "CLIP_TEACHER": negatives != "keep",
        "BLOCK_N": choice.side,
        "BLOCK_D": choice.channels,
        "DOT": dot_dtype(dtype),
        "PRECISION": dot_precision(dtype, target),
        "STAGES": choice.stages,
    }


def _options(choice: launch.GramLaunch) -> dict[str, int]:
    return {"num_warps": choice.warps, "num_stages": choice.stages}


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32; narrow operands are not rounded again on the way out."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def configurations() -> Iterator[launch.KernelBuild]:
    """Training's float32 rows and bfloat16 ones, at the tiles of every length, kept or clamped.

    196 patches (224 px) are no multiple of 16: the residual is then stored in narrow pieces.
    """
    shapes = (("keep", 196), ("keep", 1024), ("clip", 1024))
    for target in launch.ARCHITECTURES:
        listed = set()
        for dtype, (negatives, N) in itertools.product((torch.float32, torch.bfloat16), shapes):
            choice = launch.gram(target, dtype, N)
            if (dtype, negatives, choice) in listed:
                continue
            listed.add((dtype, negatives, choice))
            yield _describe_residual(choice, dtype, target, negatives, aligned=N % 16 == 0)
    channels, warps = launch.GRAM_PROJECT
    yield launch.describe_loss(
        _gram_project_kernel,
        dict.fromkeys(("x", "norms", "dx"), "*fp32"),
        {"NORMALIZE": True, "EPS": 1e-12, "BLOCK_D": channels},
        {"num_warps": warps},
        aligned=("D", "stride_image", "stride"),
        suffix="_fp32",
    )


def _describe_residual(
    choice: launch.GramLaunch, dtype: torch.dtype, target: str, negatives: str, aligned: bool
) -> launch.KernelBuild:
    pointers = dict.fromkeys(("student", "teacher", "residual"), launch.POINTERS[dtype])
    pointers |= dict.fromkeys(("student_norms", "teacher_norms", "squares"), "*fp32")
    constants = _constants(choice, dtype, target, negatives)
    constants |= {"TRIANGLE": True, "NORMALIZE": True, "STORE": True}
    divisible = ["D_student", "D_teacher", "stride_image_s", "stride_s"]
    divisible += ["stride_image_t", "stride_t", *["N"] * aligned]
    clip = "" if negatives == "keep" else f"_{negatives}"
    return launch.describe_loss(
        _gram_residual_kernel,
        pointers,
        constants,
        _options(choice),
        aligned=divisible,
        suffix=f"_{launch.POINTERS[dtype][1:]}_{choice.side}{clip}",
        targets=(target,),
        tensor_cores=True,
    )
