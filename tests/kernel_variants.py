"""What a GPU's launcher would compile: a script, without Triton's interpreter and without a GPU.

A launch first turns its arguments into types: an integer 1 becomes a compile-time constant, one
that 16 divides and an aligned pointer carry a promise. The interpreter does none of this. Here the
launcher is asked what it would compile (its cache hook) and stops there; then Triton's front end,
the part that reads Python, takes every variant. Prints JSON: refused variants, unlisted launches
(of training, which the report does not compile), and the number of variants.

    python tests/kernel_variants.py launches     those of training, and awkward ones
    python tests/kernel_variants.py arguments    integers of all shipped kernels as 1 and as 16
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # kernels imported under it are Python functions

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import ir, make_backend
from triton.runtime import driver

from dinov3core import ops
from dinov3core.kernel_report import TRITON_STAGES, shipped
from dinov3core.kernels import gram as gram_kernels
from dinov3core.kernels import launch, rope, rope_attention, rope_attention_backward
from dinov3core.ops import dispatch
from dinov3core.ops.packing import PackedGroup, Packing

GPU = GPUTarget("cuda", 90, 32)


class Variant(NamedTuple):
    """One compilation, as the launcher asks for it."""

    kernel: Any  # triton.JITFunction
    signature: Mapping[str, str]
    constants: Mapping[tuple[int, ...], Any]  # by position: given ones, and integers that are 1
    attrs: Mapping[tuple[int, ...], list]
    options: Mapping[str, int]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def is_listed(self, build: launch.KernelBuild) -> bool:
        """Whether the report compiles it, or the same for rows of more channels.

        Types of tensors, constants, warps and stages are compared; promises are for the report to
        choose, and a constant that only the launcher makes of a 1 takes fewer registers.
        """
        if build.fn is not self.kernel:
            return False
        names = self.kernel.arg_names
        given = {names[place]: value for (place,), value in self.constants.items()}
        given = {name: given[name] for name in build.constexprs}
        constants = dict(build.constexprs)
        if build.fn is gram_kernels._gram_project_kernel:
            constants["BLOCK_D"] = given["BLOCK_D"]
        tensors = [name for name, kind in build.signature.items() if kind.startswith("*")]
        options = {"num_stages": TRITON_STAGES} | dict(build.options)
        return (
            given == constants
            and all(self.signature[name] == build.signature[name] for name in tensors)
            and options == self.options
        )


class NoGpu:
    """A driver for a GPU that is not there: as much as a launch asks of one before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPU


@contextmanager
def recorded() -> Iterator[list[Variant]]:
    """Launches inside compile and run nothing, and are listed; tensors go the way of a GPU's."""
    seen: list[Variant] = []

    def note(*, fn: Any, compile: Mapping[str, Any], **rest: Any) -> bool:
        options = {name: compile[name] for name in ("num_warps", "num_stages")}
        signature, constants = compile["signature"], compile["constants"]
        seen.append(Variant(fn.jit_function, signature, constants, compile["configs"][0], options))
        return True  # no kernel: the launch ends here

    triton.knobs.runtime.jit_cache_hook = note
    driver.set_active(NoGpu())
    dispatch.is_gpu = lambda device: True
    yield seen
    triton.knobs.runtime.jit_cache_hook = None


def refusal(variant: Variant) -> str | None:
    """Why Triton's front end does not take a variant, in its own words; None where it does."""
    backend = make_backend(GPU)
    options = backend.parse_options(dict(variant.options))
    arguments = dict(variant.signature), dict(variant.constants), dict(variant.attrs)
    source = ASTSource(variant.kernel, *arguments)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    implementation, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    try:
        source.make_ir(GPU, options, implementation, modules, context)
    except triton.CompilationError as error:
        return f"{variant.name}: {str(error.__cause__ or error).strip().splitlines()[-1]}"
    return None


def training(width: int, heads: int, registers: int, table: torch.dtype) -> None:
    """The launches of a step under autocast: crops of 96, 224 and 512 px, and few of them."""
    prefix, narrow = 1 + registers, torch.bfloat16
    for patches in (36, 196, 1024):
        attention(prefix, patches, heads, width // heads, narrow, table)
    for rows, masked in ((4, 37), (16, 160)):
        targets(rows, masked, 16384, narrow)
    for negatives in ("keep", "clip"):
        for patches in (196, 1024):
            gram(patches, width, torch.float32, negatives)  # what the final norm gives


def high_resolution(width: int, heads: int, table: torch.dtype) -> None:
    """The launches of published high-resolution steps: every side of crops, few of them.

    A packed launch is one for each crop set, so that each length stands for itself.
    """
    head = width // heads
    for side in (*(7, 10, 14, 21), *(32, 48)):  # local crops of 112 to 336 px, global ones
        attention(5, side * side, 2, head, torch.bfloat16, table)
    gram(32 * 32, width, torch.float32, "keep")
    gram(48 * 48, width, torch.float32, "keep")


def attention(
    prefix: int,
    patches: int,
    heads: int,
    width: int,
    dtype: torch.dtype,
    table: torch.dtype | None,
) -> None:
    """Two images forward and backward: fused, or the rotation alone where they are too long."""
    length = prefix + patches
    qkv = torch.zeros(2 * length, 3, heads, width, dtype=dtype)
    sin = None if table is None else torch.zeros(patches, width, dtype=table)
    packing = Packing((PackedGroup(2, length, sin, sin),), prefix, interleaved=False)
    if length > launch.ROPE_ATTENTION["sm_90", width].longest:
        parts = rope.split(qkv, packing)
        rope.merge(*parts, packing)
        return
    out, lse = rope_attention.forward(qkv, packing, 0.125)
    rope_attention_backward.backward(out, qkv, out, lse, packing, 0.125)


def targets(rows: int, masked: int, prototypes: int, dtype: torch.dtype) -> None:
    """Sinkhorn and cross-entropy with gradient: two targets per CLS row, one per masked patch."""
    cls, patches = (torch.zeros(n, prototypes, dtype=dtype) for n in (rows, masked))
    pairs = torch.zeros(rows, 2, dtype=torch.int64)
    student = cls.clone().requires_grad_()
    ops.soft_cross_entropy(student, ops.sinkhorn(cls, 0.07), target_rows=pairs).backward()
    student, alone = patches.clone().requires_grad_(), torch.arange(masked)
    ops.soft_cross_entropy(student, ops.sinkhorn(patches, 0.07), target_rows=alone).backward()


def gram(patches: int, width: int, dtype: torch.dtype, negatives: str) -> None:
    student = torch.zeros(2, patches, width, dtype=dtype, requires_grad=True)
    ops.gram_loss(student, torch.zeros(2, patches, width, dtype=dtype), negatives=negatives)


def awkward() -> None:
    """One row, one tile, sizes off every multiple, dense targets, other dtypes."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for patches in (1, 16, 36, 64, 65, 257):
            for width in (1, 24, 33):
                gram(patches, width, dtype, "clip_teacher")
        for rows, prototypes in ((1, 1), (1, 16), (2, 100), (17, 33)):
            targets(rows, rows, prototypes, dtype)
            student = torch.zeros(rows, prototypes, dtype=dtype, requires_grad=True)
            ops.soft_cross_entropy(student, student.detach()).backward()
    for patches in (1, 15, 63, 64, 320):
        for table in (None, torch.float32, torch.float16):
            attention(0 if table is None else 1, patches, 1, 32, torch.float16, table)
    for width, heads in ((32, 1), (64, 2)):
        attention(1, 1000, heads, width, torch.bfloat16, torch.bfloat16)


def launches() -> dict[str, Any]:
    with recorded() as seen:
        training(384, 6, 4, torch.float32)  # vits16_1gpu
        training(1024, 16, 0, torch.bfloat16)  # vitl16_im1k
        high_resolution(384, 6, torch.float32)
        high_resolution(4096, 32, torch.bfloat16)  # the published network of 7B
        training_only = list(seen)
        awkward()
    builds = [build for build in shipped() if "sm_90" in build.targets]
    unlisted = [v for v in training_only if not any(v.is_listed(build) for build in builds)]
    return {
        "refused": refused(seen),
        "unlisted": [str(variant[1:]) for variant in distinct(unlisted, str)],
        "variants": len(distinct(seen, str)),
    }


def arguments() -> dict[str, Any]:
    """Shipped kernels with each integer argument, and all of them, as 1 and as a multiple of 16."""
    builds = distinct(shipped(), lambda build: build.fn.__name__ + str(build.fn.module))
    variants = [variant for build in builds for variant in integers(build)]
    return {"refused": refused(variants), "unlisted": [], "variants": len(variants)}


def integers(build: launch.KernelBuild) -> Iterator[Variant]:
    names = list(build.fn.arg_names)
    constants = {(names.index(name),): value for name, value in build.constexprs.items()}
    at = [names.index(name) for name, kind in build.signature.items() if kind.startswith("*")]
    pointers = {(place,): [["tt.divisibility", 16]] for place in at}
    specialised = [p.name for p in build.fn.params if not p.do_not_specialize]
    free = [name for name in specialised if build.signature[name] == "i32"]
    for chosen in [[name] for name in free] + [free, []]:
        at = [(names.index(name),) for name in chosen]
        signature = dict(build.signature) | dict.fromkeys(chosen, "constexpr")
        ones = constants | dict.fromkeys(at, 1)
        yield Variant(build.fn, signature, ones, pointers, build.options)
        aligned = pointers | {place: [["tt.divisibility", 16]] for place in at}
        yield Variant(build.fn, build.signature, constants, aligned, build.options)


def refused(variants: list[Variant]) -> list[str]:
    return sorted({text for v in distinct(variants, str) if (text := refusal(v)) is not None})


def distinct(items: Any, key: Callable[[Any], str]) -> list[Any]:
    return list({key(item): item for item in items}.values())


if __name__ == "__main__":
    print(json.dumps({"launches": launches, "arguments": arguments}[sys.argv[1]]()))
