"""What is benchmarked: every op at the shapes of training, ours and what people use instead.

Shapes in names: images x tokens, heads x head width; rows x prototypes. Sizes per kind of machine:
`gpu` are those of a training step (64 images, ViT-S to ViT-7B), `cpu` the same scaled to two cores,
`dry` tiny ones that only prove that everything runs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import baselines
from dinov3core import ops

Inputs = Mapping[str, Tensor]
Variant = Callable[[Inputs], Tensor]

PREFIX = 5  # CLS and four registers
TEACHER_TEMPERATURE, STUDENT_TEMPERATURE = 0.07, 0.1


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op, shape: its name in results is "op shape".
        make: inputs on a device, in the dtype of the benchmark.
        leaves: the inputs that get gradients; none: forward only.
        variants: "ours", "plain" (the formula), and others; each maps the inputs to the output.
        elements: input and output elements that must cross memory, forward and forward + backward.
        flops: multiplications and additions, the same way.
        compiles: torch.compile of "plain" is a sensible rival ("sdpa" where there is one).
        dense: the output as a tensor that can be compared.
    """

    op: str
    shape: str
    make: Callable[[torch.device, torch.dtype], dict[str, Tensor]]
    leaves: tuple[str, ...]
    variants: Mapping[str, Variant]
    elements: tuple[float, float]
    flops: tuple[float, float]
    compiles: bool = True
    dense: Callable[[object], Tensor] = lambda output: output

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape}"

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward", "forward+backward") if self.leaves else ("forward",)


def attention(images: int, tokens: int, heads: int, head_dim: int) -> Case:
    """One crop set through rotation and attention, straight from the qkv projection."""
    grid = _grid(tokens)

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        sin, cos = ops.rope_table(*grid, head_dim, device=device)
        qkv = torch.randn(images, tokens, 3, heads, head_dim, device=device, dtype=dtype)
        return {"qkv": qkv, "sin": sin, "cos": cos, "grad": torch.randn_like(qkv[:, :, 0])}

    def through(function: Callable[..., Tensor]) -> Variant:
        return lambda x: function(x["qkv"], x["sin"], x["cos"], PREFIX)

    variants = {
        "ours": lambda x: ops.rope_attention(x["qkv"], x["sin"], x["cos"], prefix_tokens=PREFIX),
        "sdpa": through(baselines.rope_then_sdpa),
        "plain": through(baselines.rope_then_softmax),
    }
    if xformers_works():
        variants["xformers"] = through(baselines.rope_then_xformers)
    size, pairs = images * tokens * heads * head_dim, images * heads * tokens**2 * head_dim
    return Case(
        "rope_attention",
        f"{images}x{tokens} {heads}x{head_dim}",
        make,
        ("qkv",),
        variants,
        (4 * size, 12 * size),
        (4 * pairs, 14 * pairs),
    )


def packed_attention(images: int, tokens: tuple[int, int], heads: int, head_dim: int) -> Case:
    """Two global and eight local crops of each image in one call, against one call per crop set."""
    grid, small_grid = _grid(tokens[0]), _grid(tokens[1])
    counts = (2 * images, 8 * images)
    split = counts[0] * tokens[0]
    total = split + counts[1] * tokens[1]

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        sin, cos = ops.rope_table(*grid, head_dim, device=device)
        small_sin, small_cos = ops.rope_table(*small_grid, head_dim, device=device)
        qkv = torch.randn(total, 3, heads, head_dim, device=device, dtype=dtype)
        tables = {"sin": sin, "cos": cos, "small_sin": small_sin, "small_cos": small_cos}
        return {"qkv": qkv, "grad": torch.randn_like(qkv[:, 0]), **tables}

    def packed(x: Inputs) -> Tensor:
        groups = [(counts[0], x["sin"], x["cos"]), (counts[1], x["small_sin"], x["small_cos"])]
        return ops.rope_attention_packed(x["qkv"], groups, prefix_tokens=PREFIX)

    def separate(x: Inputs) -> Tensor:
        large, small = (
            x["qkv"][:split].unflatten(0, (-1, tokens[0])),
            x["qkv"][split:].unflatten(0, (-1, tokens[1])),
        )
        outs = [
            baselines.rope_then_sdpa(large, x["sin"], x["cos"], PREFIX),
            baselines.rope_then_sdpa(small, x["small_sin"], x["small_cos"], PREFIX),
        ]
        return torch.cat([out.flatten(0, 1) for out in outs])

    size = total * heads * head_dim
    pairs = sum(c * n**2 for c, n in zip(counts, tokens, strict=True)) * heads * head_dim
    shape = f"{counts[0]}x{tokens[0]} + {counts[1]}x{tokens[1]} {heads}x{head_dim}"
    variants = {"ours": packed, "sdpa": separate}
    return Case(
        "rope_attention_packed",
        shape,
        make,
        ("qkv",),
        variants,
        (4 * size, 12 * size),
        (4 * pairs, 14 * pairs),
    )


def gram(
    images: int, patches: int, width: int, *, whole_batch: bool = False, negatives: str = "keep"
) -> Case:
    """Patch similarities of student and teacher; a student close to its anchor, as in training."""
    options = {"per_image": not whole_batch, "negatives": negatives}

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        student = torch.randn(images, patches, width, device=device, dtype=dtype)
        return {"student": student, "teacher": student + 0.1 * torch.randn_like(student)}

    variants = {
        "ours": lambda x: ops.gram_loss(x["student"], x["teacher"], **options),
        "plain": lambda x: baselines.gram_loss(x["student"], x["teacher"], **options),
    }
    grams, rows = (1, images * patches) if whole_batch else (images, patches)
    through_rows, through_width = 2 * grams * rows**2 * width, 4 * grams * rows * width**2
    work = min(through_rows, through_width) if negatives == "keep" else through_rows
    shape = f"whole batch {rows}x{width}" if whole_batch else f"{images}x{patches}x{width}"
    size = images * patches * width
    return Case(
        "gram_loss",
        shape + ("" if negatives == "keep" else f" {negatives}"),
        make,
        ("student",),
        variants,
        (2 * size, 3 * size),
        (work, 2 * work),
    )


def sinkhorn(rows: int, prototypes: int) -> Case:
    """Balanced targets.

    Ours ends with scaling vectors, the plain form with the matrix; no loss needs the matrix.
    """
    variants = {
        "ours": lambda x: ops.sinkhorn(x["teacher"], TEACHER_TEMPERATURE),
        "plain": lambda x: baselines.sinkhorn(x["teacher"], TEACHER_TEMPERATURE),
    }
    size = rows * prototypes
    return Case(
        "sinkhorn",
        f"{rows}x{prototypes}",
        lambda device, dtype: {"teacher": _logits(rows, prototypes, device, dtype)},
        (),
        variants,
        (5 * size, 5 * size),
        (0, 0),
        dense=lambda output: output.dense() if isinstance(output, ops.Assignment) else output,
    )


def sinkhorn_cross_entropy(rows: int, prototypes: int) -> Case:
    """The iBOT term: targets of masked patches and the student's loss on them."""

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: _logits(rows, prototypes, device, dtype) for name in ("student", "teacher")}

    def ours(x: Inputs) -> Tensor:
        targets = ops.sinkhorn(x["teacher"], TEACHER_TEMPERATURE)
        return ops.soft_cross_entropy(x["student"], targets, temperature=STUDENT_TEMPERATURE)

    def plain(x: Inputs) -> Tensor:
        targets = baselines.sinkhorn(x["teacher"], TEACHER_TEMPERATURE)
        return baselines.cross_entropy(x["student"], targets, STUDENT_TEMPERATURE).mean()

    size, variants = rows * prototypes, {"ours": ours, "plain": plain}
    return Case(
        "sinkhorn_cross_entropy",
        f"{rows}x{prototypes}",
        make,
        ("student",),
        variants,
        (7 * size, 10 * size),
        (0, 0),
    )


def multi_crop_cross_entropy(images: int, prototypes: int) -> Case:
    """The DINO term of eight local crops against two teacher crops, targets included."""
    students, teachers = 8, 2

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        images_S = torch.arange(images, device=device).repeat(students)
        return {
            "student": _logits(students * images, prototypes, device, dtype),
            "teacher": _logits(teachers * images, prototypes, device, dtype),
            "target_rows": torch.stack([images_S, images_S + images], 1),
        }

    def ours(x: Inputs) -> Tensor:
        targets = ops.sinkhorn(x["teacher"], TEACHER_TEMPERATURE)
        rows = x["target_rows"]
        return ops.soft_cross_entropy(
            x["student"], targets, temperature=STUDENT_TEMPERATURE, target_rows=rows
        )

    def plain(x: Inputs) -> Tensor:
        targets = baselines.sinkhorn(x["teacher"], TEACHER_TEMPERATURE).unflatten(
            0, (teachers, images)
        )
        return baselines.dino_loss(
            x["student"].unflatten(0, (students, images)), targets, STUDENT_TEMPERATURE
        )

    size, teacher_size = students * images * prototypes, teachers * images * prototypes
    return Case(
        "multi_crop_cross_entropy",
        f"{students}x{images} on {teachers}x{images}, {prototypes}",
        make,
        ("student",),
        {"ours": ours, "plain": plain},
        (size + 6 * teacher_size, 3 * size + 7 * teacher_size),
        (0, 0),
    )


def linear_cross_entropy(rows: int, width: int, prototypes: int) -> Case:
    """Prototype layer and loss: ours without the logits, against logits written out."""

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        features = F.normalize(torch.randn(rows, width, device=device), dim=-1).to(dtype)
        weight = torch.randn(prototypes, width, device=device).mul_(0.2).to(dtype)
        return {
            "features": features,
            "weight": weight,
            "teacher": _logits(rows, prototypes, device, dtype),
        }

    def ours(x: Inputs) -> Tensor:
        targets = ops.sinkhorn(x["teacher"], TEACHER_TEMPERATURE)
        return ops.linear_soft_cross_entropy(
            x["features"], x["weight"], targets, temperature=STUDENT_TEMPERATURE
        )

    def plain(x: Inputs) -> Tensor:
        targets = baselines.sinkhorn(x["teacher"], TEACHER_TEMPERATURE)
        return baselines.linear_cross_entropy(
            x["features"], x["weight"], targets, STUDENT_TEMPERATURE
        ).mean()

    product, layer = 2 * rows * width * prototypes, rows * width + prototypes * width
    return Case(
        "linear_soft_cross_entropy",
        f"{rows}x{width}, {prototypes}",
        make,
        ("features", "weight"),
        {"ours": ours, "plain": plain},
        (6 * rows * prototypes + layer, 7 * rows * prototypes + 3 * layer),
        (product, 3 * product),
    )


def koleo(rows: int, width: int) -> Case:
    """Nearest neighbours among the CLS tokens of a crop."""
    return Case(
        "koleo_loss",
        f"{rows}x{width}",
        lambda device, dtype: {"features": torch.randn(rows, width, device=device, dtype=dtype)},
        ("features",),
        {
            "ours": lambda x: ops.koleo_loss(x["features"]),
            "plain": lambda x: baselines.koleo_loss(x["features"]),
        },
        (rows * width, 3 * rows * width),
        (2 * rows**2 * width, 2 * rows**2 * width),
    )


def attention_cases(scale: str) -> list[Case]:
    """RoPE attention at the sequence lengths of local, global and high-resolution crops."""
    if scale == "dry":
        return [attention(2, 54, 2, 32), packed_attention(1, (41, 14), 2, 32)]
    if scale == "cpu":
        shapes = [
            (64, 41, 6, 64),
            (32, 54, 6, 64),
            (8, 201, 6, 64),
            (8, 261, 6, 64),
            (2, 1029, 6, 64),
        ]
        shapes += [(1, 2309, 6, 64), (4, 261, 16, 64), (4, 261, 8, 128)]
        return [attention(*shape) for shape in shapes] + [packed_attention(4, (201, 41), 6, 64)]
    heads = [(6, 64), (12, 64), (16, 64), (32, 128)]
    lengths = [(512, 54), (128, 201), (128, 261), (32, 1029), (8, 2309)]
    packed = [packed_attention(64, (261, 54), 16, 64), packed_attention(16, (261, 54), 32, 128)]
    return [attention(*length, *head) for head in heads for length in lengths] + packed


def loss_cases(scale: str) -> list[Case]:
    """The losses at per-process batch sizes."""
    if scale == "dry":
        return [
            gram(2, 16, 32),
            gram(2, 64, 16, whole_batch=True),
            gram(2, 16, 32, negatives="clip"),
            sinkhorn(16, 96),
            sinkhorn_cross_entropy(16, 96),
            multi_crop_cross_entropy(3, 96),
            linear_cross_entropy(16, 32, 96),
            koleo(8, 32),
        ]
    if scale == "cpu":
        return [
            gram(16, 4096 // 16, 384, whole_batch=True),
            gram(8, 256, 384),
            gram(2, 1024, 384),
            gram(1, 2304, 384),
            gram(2, 1024, 384, negatives="clip"),
            sinkhorn(128, 65536),
            sinkhorn(512, 65536),
            sinkhorn_cross_entropy(512, 65536),
            multi_crop_cross_entropy(16, 65536),
            linear_cross_entropy(512, 256, 65536),
            koleo(64, 384),
        ]
    return [
        *(gram(128, patches, width) for width in (384, 1024, 4096) for patches in (256, 1024)),
        *(gram(32, 2304, width) for width in (384, 1024)),
        *(gram(64, 256, width, whole_batch=True) for width in (384, 1024)),
        gram(128, 1024, 1024, negatives="clip"),
        *(sinkhorn(*size) for size in ((128, 65536), (3771, 65536), (1274, 98304), (128, 262144))),
        *(sinkhorn_cross_entropy(*size) for size in ((3771, 65536), (4915, 65536), (1274, 98304))),
        multi_crop_cross_entropy(64, 65536),
        multi_crop_cross_entropy(16, 262144),
        linear_cross_entropy(3771, 256, 65536),
        koleo(64, 1024),
    ]


def xformers_works() -> bool:
    """Whether xformers can be imported and a GPU is there: it has no attention for CPU tensors that
    trains.
    """
    if not torch.cuda.is_available():
        return False
    try:
        import xformers.ops  # noqa: F401
    except ImportError:
        return False
    return True


def _grid(tokens: int) -> tuple[int, int]:
    """The square patch grid of a sequence length, without the prefix tokens."""
    side = math.isqrt(tokens - PREFIX)
    return side, side


def _logits(rows: int, prototypes: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Logits of a unit-norm bottleneck: of order 1 over the temperature; no form overflows."""
    return torch.randn(rows, prototypes, device=device).mul_(0.2).to(dtype)
