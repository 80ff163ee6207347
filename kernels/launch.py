"""Launch tables: every choice of tiles, warps and stages, as data; no other file holds one.

Nothing is tuned inside a step. What runs is the table below, or the entries of the file that
`python -m dinov3core.tune` wrote for this kind of GPU (in ~/.cache/dinov3core), read once per
process.

A `KernelBuild` describes one shipped configuration completely, so that `python -m
dinov3core.kernel_report` can compile it for a GPU that is not there. Register counts in comments
are from such builds (triton 3.7.1, sm_90 unless said).
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from dinov3core.kernels.tiles import front_remainder, padded

# The compute capability from which a GPU reads a column of the tables, newest first. sm_86 and
# sm_89 (RTX 30 and 40, L40S) run the instructions of sm_80 with less shared memory; so does sm_120
# (RTX 50), which has neither the tensor memory of sm_100 nor the wgmma of sm_90.
CAPABILITIES = {
    (12, 0): "sm_120",
    (10, 0): "sm_100",
    (9, 0): "sm_90",
    (8, 9): "sm_89",
    (8, 6): "sm_86",
    (8, 0): "sm_80",
}
ARCHITECTURES = (*reversed(CAPABILITIES.values()), "gfx942")
LIKE_SM_80 = ("sm_86", "sm_89")  # in instructions
DISTINCT = tuple(name for name in ARCHITECTURES if name not in LIKE_SM_80)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
HEAD_WIDTHS = (32, 64, 128)


class KernelBuild(NamedTuple):
    """One kernel as it is launched: enough to compile it without a device.

    `signature` maps every argument to its Triton type ("*bf16", "i32", "fp32", "constexpr"),
    `attrs` names the arguments that a launcher would specialise as divisible by 16, `options` holds
    num_warps and num_stages. `targets` lists the architectures it is compiled for; a kernel that
    needs little shared memory is compiled once for those that differ in nothing else (DISTINCT).
    `tensor_cores` says that losing them would be a defect.
    """

    name: str
    fn: Callable
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    attrs: tuple[str, ...]
    options: Mapping[str, int]
    targets: tuple[str, ...] = DISTINCT
    tensor_cores: bool = True


@dataclasses.dataclass(frozen=True)
class RopeAttentionLaunch:
    """How rope_attention runs on one architecture at one head width.

    Attributes:
        longest: longer sequences are left to torch's attention by backend="auto" (a prediction
            until measured).
        resident_keys: up to here all keys of a head stay on chip.
        resident_warps: warps of that kernel; its query tiles have 64 rows.
        stream: (query rows, keys, warps, stages) of the streaming forward.
        one_tile_warps: warps of the backward of sequences up to 64 tokens.
        two_pass: (dq rows, dq keys, dkv queries, dkv keys, warps, stages) of the backward of longer
            ones.
    """

    longest: int
    resident_keys: int
    resident_warps: int
    stream: tuple[int, int, int, int]
    one_tile_warps: int
    two_pass: tuple[int, int, int, int, int, int]


# No rows for sm_80, sm_86, sm_89 and sm_120: without wgmma the operands of every product pass
# through registers. On sm_80 the backward spills 100 to 300 bytes per thread at D = 64 in all of
# 10 tilings tried, the forward 300 at D = 128; on sm_120 the tiles of sm_100 spill up to 8,688.
ROPE_ATTENTION: dict[tuple[str, int], RopeAttentionLaunch] = {
    ("sm_90", 32): RopeAttentionLaunch(640, 272, 4, (128, 64, 8, 2), 4, (128, 64, 64, 128, 8, 1)),
    ("sm_90", 64): RopeAttentionLaunch(640, 272, 4, (128, 64, 8, 2), 4, (128, 64, 64, 128, 8, 1)),
    # 64 keys at most stay resident: 256 spill 50 bytes. dkv tiles of 32 queries: with 64 the dk, dv
    # pass spills.
    ("sm_90", 128): RopeAttentionLaunch(450, 64, 4, (128, 64, 8, 2), 8, (64, 64, 32, 64, 8, 2)),
    # Accumulators live in tensor memory: 120 to 180 registers where sm_90 needs 255.
    ("sm_100", 32): RopeAttentionLaunch(640, 272, 4, (128, 64, 8, 2), 8, (64, 64, 32, 64, 8, 2)),
    ("sm_100", 64): RopeAttentionLaunch(640, 272, 4, (128, 64, 8, 2), 8, (128, 32, 32, 64, 8, 2)),
    ("sm_100", 128): RopeAttentionLaunch(450, 64, 4, (128, 64, 8, 2), 8, (64, 64, 32, 64, 8, 2)),
    # 512 registers per thread of 4 waves; D = 128 is missing because its one-tile backward spills
    # 700 bytes.
    ("gfx942", 32): RopeAttentionLaunch(640, 64, 4, (128, 64, 4, 1), 4, (64, 32, 32, 64, 4, 1)),
    ("gfx942", 64): RopeAttentionLaunch(640, 64, 4, (128, 64, 4, 1), 4, (64, 32, 32, 64, 4, 1)),
}


# Keys of the resident forward behind its first tile, by how many whole blocks of 64 tokens a
# sequence has: two powers of two that add up to them. Its query tiles have as many rows as a block.
RESIDENT_BLOCK = 64
RESIDENT_KEYS = ((0, 0), (64, 0), (128, 0), (128, 64), (128, 128))
ONE_TILE = 64  # tokens up to which the backward of an (image, head) is a single tile


def resident_tiles(length: int, longest: int) -> tuple[int, int, int] | None:
    """(R, A, B) of the resident forward at `length` tokens, or None where it does not fit."""
    whole = (length - 1) // RESIDENT_BLOCK
    remainder = front_remainder(length, RESIDENT_BLOCK)
    # R = 64 beside 192 keys spills 16 bytes at D = 64, sm_90
    if length > longest or (whole >= 3 and remainder > 16):
        return None
    return padded(remainder), *RESIDENT_KEYS[whole]


# (rows, warps) of the kernels that only rotate: 48 registers at D = 64, every load 128 bits wide
ROTATION = (32, 4)


class GramLaunch(NamedTuple):
    """How the residual of two Grams runs: side of a square tile, channels per step."""

    side: int
    channels: int
    warps: int
    stages: int


# By architecture: for rows of 2 bytes, for N > 256 of them, for float32 rows. Tiles of 128 rows
# read half as much, but up to N = 256 they leave a GPU idle (3 per image, where there are 10 of
# 64), and they spill 8 bytes on sm_86 and sm_89, 48 on sm_120. Three products of float32 rows hold
# two parts of every operand: tiles of 128 x 32 spill 32 to 990 bytes everywhere, 64 x 32 spill 8
# to 16 without wgmma.
_MMA = GramLaunch(64, 64, 4, 3), GramLaunch(64, 64, 4, 3), GramLaunch(64, 16, 4, 3)
_WGMMA = GramLaunch(64, 64, 4, 3), GramLaunch(128, 64, 8, 3), GramLaunch(64, 32, 4, 3)
GRAM = {
    "sm_80": (GramLaunch(64, 64, 4, 3), GramLaunch(128, 64, 8, 3), GramLaunch(64, 16, 4, 3)),
    "sm_90": _WGMMA,
    "sm_100": _WGMMA,
    "gfx942": (GramLaunch(64, 64, 4, 2), GramLaunch(128, 64, 8, 2), GramLaunch(64, 32, 4, 2)),
}
# Bytes of stored residual at once: that of 64 crops of 768 px takes 1.4 GB. Where one image is
# larger, its rows are taken in multiples of the largest tile.
GRAM_SLAB_BYTES = 1 << 28
GRAM_SLAB_ROWS = 128
# (channels, warps) of the kernel that takes the gradient through the normalisation, a row a program
GRAM_PROJECT = (1024, 4)


def gram(target: str, dtype: torch.dtype, length: int) -> GramLaunch:
    """The launch for Grams of `length` rows; the smallest tiles for architectures without a row."""
    short, long, float32 = GRAM.get(target, _MMA)
    if dtype == torch.float32:
        return float32
    return short if length <= 256 else long


class LogitsLaunch(NamedTuple):
    """How a pass over logits [R, K] runs: rows and columns of its tiles, warps of a program."""

    block_r: int
    block_k: int
    warps: int

    def narrowed(self, prototypes: int) -> "LogitsLaunch":
        """The same with tiles no wider than rows of `prototypes` logits need."""
        return self._replace(block_k=min(self.block_k, triton.next_power_of_2(prototypes)))


SINKHORN = LogitsLaunch(block_r=8, block_k=512, warps=4)
CROSS_ENTROPY = LogitsLaunch(block_r=4, block_k=512, warps=4)
# The running sums of the losses take 165 registers per thread of 4 warps on sm_90; on sm_120 the
# assembler spills 8 bytes of them.
CROSS_ENTROPY_LOSSES = dict.fromkeys(ARCHITECTURES, CROSS_ENTROPY)
CROSS_ENTROPY_LOSSES["sm_120"] = CROSS_ENTROPY._replace(warps=8)
MERGE = (256, 4)  # (sums, warps) of a program that merges what parts of a row or column gave
PROGRAMS = 1024  # enough to fill any current GPU a few times


def parts_of(blocks: int, length: int, block: int) -> tuple[int, int]:
    """How many programs share a sum of `length` terms, and how many terms each of them takes.

    `blocks` such sums (tiles of rows or of columns) are launched; a share is whole blocks of
    `block` terms.
    """
    length = max(1, length)
    wanted = max(1, min(PROGRAMS // blocks, triton.cdiv(length, block)))
    share = triton.cdiv(triton.cdiv(length, wanted), block) * block
    return triton.cdiv(length, share), share


_FLOAT32 = {"lse", "delta"}  # every other tensor: bfloat16
_TABLES = {"sin", "cos"}
_TENSORS = {"qkv", "dqkv", "out", "dout", "q", "k", "v", "dq", "dk", "dv", *_FLOAT32, *_TABLES}
# One length per set of tiles: one tile, remainders of 1 .. 16 and of 64 rows behind blocks of 64,
# beyond the resident, 64 rows behind a single block (crops of 160 px).
_LENGTHS = (54, 201, 256, 261, 512, 577, 105)
# Tables in bfloat16: the tiles of local and global crops of ViT-L at 96 and 224 px, and of all
# crops of the 7B network at high resolution that the kernels take.
_NARROW_TABLES = {64: (54, 201), 128: (54, 105, 201, 446)}


def attention_builds(plan: Callable) -> Iterator[KernelBuild]:
    """The kernels that `plan(choice, length, prefix)` picks for the tables and lengths above."""
    for (target, width), choice in ROPE_ATTENTION.items():
        shared = {"D": width, "ROTATE": True, "INTERLEAVED": False, "DOT": tl.bfloat16}
        narrow = _NARROW_TABLES.get(width, ())
        lengths = [(torch.float32, n) for n in _LENGTHS] + [(torch.bfloat16, n) for n in narrow]
        seen = []
        for table, length in lengths:
            kernel, tiles, options = plan(choice, length, 1)
            if (table, kernel, tiles) in seen:
                continue
            seen.append((table, kernel, tiles))
            names = {"length": length, "table": table}
            yield describe(kernel, width, {**shared, **tiles}, options, (target,), **names)


def describe(
    kernel: Callable,
    width: int,
    constants: dict,
    options: dict,
    targets: tuple[str, ...] = DISTINCT,
    *,
    length: int = 0,
    table: torch.dtype = torch.float32,
    tensor_cores: bool = True,
) -> KernelBuild:
    """A KernelBuild from the argument names that the rotation and attention kernels share."""
    signature = {}
    for argument in kernel.arg_names:
        kind = "fp32" if argument == "scale" else "i32"
        if argument in constants:
            kind = "constexpr"
        elif argument in _TENSORS:
            kind = "*fp32" if argument in _FLOAT32 else "*bf16"
            kind = POINTERS[table] if argument in _TABLES else kind
        signature[argument] = kind
    aligned = _TENSORS | {n for n in signature if n.startswith(("stride_", "part_"))}
    attrs = tuple(n for n in signature if n in aligned)
    name = f"{report_name(kernel)} D={width}" + (f" N={length}" if length else "")
    name += "" if table == torch.float32 else f" tables {POINTERS[table][1:]}"
    return KernelBuild(name, kernel, signature, constants, attrs, options, targets, tensor_cores)


def describe_loss(
    kernel: Callable,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    options: Mapping[str, int],
    *,
    aligned: Sequence[str] = (),
    suffix: str = "",
    targets: tuple[str, ...] = DISTINCT,
    tensor_cores: bool = False,
) -> KernelBuild:
    """A KernelBuild of a loss kernel, whose other arguments are sizes, or factors in float32.

    Args:
        pointers: types of the tensors by name; all of them are aligned.
        aligned: sizes and strides that 16 divides.
        suffix: tells builds of one kernel apart.
    """
    signature = {}
    for argument in kernel.arg_names:
        kind = "fp32" if argument in ("alpha", "factor") else "i32"
        kind = "constexpr" if argument in constants else kind
        signature[argument] = pointers.get(argument, kind)
    name = report_name(kernel) + suffix
    attrs = (*pointers, *aligned)
    return KernelBuild(name, kernel, signature, constants, attrs, options, targets, tensor_cores)


def report_name(kernel: Callable) -> str:
    """What the report calls a kernel: its name in a profile, without the marks of a kernel."""
    return kernel.__name__.strip("_").removesuffix("_kernel")


_replaced: dict[tuple[str, int], RopeAttentionLaunch] = {}


def rope_attention(device: torch.device, width: int) -> RopeAttentionLaunch | None:
    """The entry for a device and a head width, None where none is shipped.

    Looked for in what `replace` was given, then in the tuned file, then in the table.
    """
    key = architecture(device), width
    return _replaced.get(key) or _tuned(device).get(key) or ROPE_ATTENTION.get(key)


def replace(target: str, width: int, entry: RopeAttentionLaunch | None) -> None:
    """Use `entry` in this process from now on; None goes back to the file or the table."""
    if entry is None:
        _replaced.pop((target, width), None)
    else:
        _replaced[target, width] = entry


def tuned_file(device: torch.device) -> Path:
    """Where `python -m dinov3core.tune` writes for this kind of GPU, and where launches look."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    name = name.replace(" ", "_").replace("/", "_")
    return Path.home() / ".cache" / "dinov3core" / f"launch_{name}.json"


def write_file(path: Path, entries: Mapping[tuple[str, int], RopeAttentionLaunch]) -> None:
    """Store entries as `read_file` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {
        f"{target}/{width}": dataclasses.asdict(entry) for (target, width), entry in entries.items()
    }
    path.write_text(json.dumps({"rope_attention": table}, indent=1) + "\n")


def read_file(path: Path) -> dict[tuple[str, int], RopeAttentionLaunch]:
    """Entries of a tuned file.

    Raises:
        ValueError: a file of another layout, for instance of another version.
    """
    entries = {}
    fields = {field.name for field in dataclasses.fields(RopeAttentionLaunch)}
    for key, values in json.loads(path.read_text()).get("rope_attention", {}).items():
        target, _, width = key.partition("/")
        if set(values) != fields or not width.isdigit():
            raise ValueError(
                f"{path}: expected entries with {sorted(fields)}, got {key}: {values}; tune again"
            )
        lists = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        entries[target, int(width)] = RopeAttentionLaunch(**lists)
    return entries


@functools.cache
def _tuned(device: torch.device) -> dict[tuple[str, int], RopeAttentionLaunch]:
    path = tuned_file(device)
    return read_file(path) if path.is_file() else {}


@functools.cache
def architecture(device: torch.device) -> str:
    """The column of the tables a device reads: the newest architecture listed that is not newer."""
    if device.type != "cuda":
        return "sm_90"  # the interpreter: any table is as good as another
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    listed = (name for lowest, name in CAPABILITIES.items() if (major, minor) >= lowest)
    return next(listed, f"sm_{major}{minor}")
