"""The Triton kernels of rope_attention in the interpreter, against float64, at every tile they can
be cut into.
"""

import contextlib
import importlib
import inspect
import json
from pathlib import Path

import numpy
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

import triton

from dinov3core.kernel_report import SHARED_LIMIT, shipped
from dinov3core.kernels import launch, rope, tiles
from dinov3core.kernels import rope_attention as kernels
from dinov3core.kernels import rope_attention_backward as backward_kernels
from dinov3core.ops import dispatch, reference, rope_attention, rope_attention_packed
from dinov3core.ops import packing as packing_file
from dinov3core.ops.packing import PackedGroup, Packing
from dinov3core.ops.rope_attention_op import rope_attention_op
from dinov3core.ops.rope_split import rope_merge_op, rope_split_op

BEFORE_3_7 = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7)
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore::RuntimeWarning"
    ),  # NumPy speaks up where a GPU masks NaN and overflow silently
    pytest.mark.skipif(
        not tiles.interpreted(), reason="needs TRITON_INTERPRET=1 before triton is imported"
    ),
    pytest.mark.skipif(
        BEFORE_3_7 and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0",
        reason="before Triton 3.7 the interpreter takes no loop bound at run time with NumPy 2.4",
    ),
]

# One length per combination of tiles: one tile; two and three resident pieces with remainders of 1,
# 9 and 64 rows; streaming with a small, a whole and a middling remainder; prefixes inside, at and
# beyond the first tile.
LENGTHS = [
    (1, 1),
    (2, 0),
    (37, 1),
    (54, 5),
    (64, 5),
    (65, 5),
    (128, 3),
    (201, 5),
    (256, 1),
    (261, 5),
    (330, 5),
]


def example(tokens, prefix, width, *, images=1, heads=1, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    qkv = torch.randn(images, tokens, 3, heads, width, generator=g, dtype=torch.float64)
    angles = (
        torch.randn(tokens - prefix, width // 2, generator=g, dtype=torch.float64).mul(3).tile(2)
    )
    dout = torch.randn(images, tokens, heads, width, generator=g, dtype=torch.float64)
    return qkv.to(dtype), angles.sin().float(), angles.cos().float(), dout.to(dtype)


def value_and_gradient(function, qkv, dout):
    leaf = qkv.detach().clone().requires_grad_()
    out = function(leaf)
    out.backward(dout)
    return out.detach(), leaf.grad


def exact(qkv, sin, cos, dout, prefix, **options):
    tables = (None, None) if sin is None else (sin.double(), cos.double())
    return value_and_gradient(
        lambda x: reference.rope_attention(x, *tables, prefix_tokens=prefix, **options),
        qkv.double(),
        dout.double(),
    )


def check(ours, want, eps):
    """Within 16 roundings of the largest value: 400 float32 terms in any order stay below that."""
    for got, value in zip(ours, want, strict=True):
        assert (got.double() - value).abs().max() <= 16 * eps * max(1.0, value.abs().max())


class TestAttention:
    @pytest.mark.parametrize("width", [32, 64, 128])
    @pytest.mark.parametrize(("tokens", "prefix"), LENGTHS)
    def test_against_float64(self, tokens, prefix, width):
        if tokens > 128 and width == 128 and tokens not in (201, 330):
            pytest.skip("the same tiles as at width 64")
        qkv, sin, cos, dout = example(tokens, prefix, width)
        ours = value_and_gradient(
            lambda x: rope_attention(x, sin, cos, prefix_tokens=prefix, backend="triton"), qkv, dout
        )
        check(ours, exact(qkv, sin, cos, dout, prefix), torch.finfo(torch.float32).eps)

    @pytest.mark.parametrize("tokens", [54, 70, 330])
    @pytest.mark.parametrize(
        "options", [{"rotation": "interleaved"}, {"scale": 2.0}, {"scale": 1e-4}]
    )
    def test_options(self, tokens, options):
        qkv, sin, cos, dout = example(tokens, 5, 32)
        ours = value_and_gradient(
            lambda x: rope_attention(x, sin, cos, prefix_tokens=5, backend="triton", **options),
            qkv,
            dout,
        )
        check(ours, exact(qkv, sin, cos, dout, 5, **options), 4 * torch.finfo(torch.float32).eps)

    @pytest.mark.parametrize("tokens", [54, 70])
    def test_without_rotation(self, tokens):
        qkv, _, _, dout = example(tokens, 0, 32)
        ours = value_and_gradient(
            lambda x: rope_attention(x, None, None, backend="triton"), qkv, dout
        )
        check(ours, exact(qkv, None, None, dout, 0), torch.finfo(torch.float32).eps)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("tokens", [54, 201])
    def test_narrow_inputs_round_where_the_reference_rounds(self, tokens, dtype):
        qkv, sin, cos, dout = example(tokens, 5, 64, dtype=dtype)
        ours = value_and_gradient(
            lambda x: rope_attention(x, sin, cos, prefix_tokens=5, backend="triton"), qkv, dout
        )
        assert ours[0].dtype == ours[1].dtype == dtype
        check(
            ours, exact(qkv, sin, cos, dout, 5), torch.finfo(dtype).eps / 4
        )  # q, k, P, dS and the result: 4 roundings

    def test_bfloat16_tables_round_q_and_k(self):
        qkv, sin, cos, dout = example(54, 5, 64)
        tables = sin.bfloat16(), cos.bfloat16()
        ours = value_and_gradient(
            lambda x: rope_attention(x, *tables, prefix_tokens=5, backend="triton"), qkv, dout
        )
        rounded = qkv.clone()
        rounded[:, :, :2] = qkv[:, :, :2].bfloat16().float()
        want = exact(rounded, *(table.float() for table in tables), dout, 5)
        assert (ours[0].double() - want[0]).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps

    @pytest.mark.parametrize("tokens", [20, 70, 330])
    def test_what_lies_beyond_the_sequence_is_not_read(self, tokens):
        """Padded rows of a tile are the next image's tokens: NaN there must not arrive here."""
        qkv, sin, cos, dout = example(tokens, 5, 32, images=3, heads=2)
        qkv[0], qkv[2] = float("nan"), float("inf")
        ours = value_and_gradient(
            lambda x: rope_attention(x, sin, cos, prefix_tokens=5, backend="triton"), qkv, dout
        )
        check(
            [x[1:2] for x in ours],
            exact(qkv[1:2], sin, cos, dout[1:2], 5),
            torch.finfo(torch.float32).eps,
        )

    @pytest.mark.parametrize("tokens", [20, 70])
    def test_scores_far_apart(self, tokens):
        """A padded key scores 0; beside real scores near -400 it would own the softmax if it were
        not masked.
        """
        qkv, sin, cos, dout = example(tokens, 0, 32)
        qkv[:, :, 0] = 8.0 + 0.01 * qkv[:, :, 0]
        qkv[:, :, 1] = -8.0 + 0.01 * qkv[:, :, 1]
        sin, cos = torch.zeros_like(sin), torch.ones_like(cos)
        ours = value_and_gradient(
            lambda x: rope_attention(x, sin, cos, backend="triton"), qkv, dout
        )
        check(
            ours, exact(qkv, sin, cos, dout, 0), 400 * torch.finfo(torch.float32).eps
        )  # P: relative eps * |lse|

    def test_packed_crops_strided_and_twice_the_same(self):
        sets = [
            example(tokens, 3, 32, images=images, heads=2, seed=images)
            for tokens, images in ((70, 1), (19, 2))
        ]
        packed = torch.cat([qkv.flatten(0, 1) for qkv, *_ in sets])
        strided = torch.stack([packed, packed], -1)[..., 0]
        dout = torch.cat([dout.flatten(0, 1) for *_, dout in sets])
        groups = [(len(qkv), sin, cos) for qkv, sin, cos, _ in sets]
        first, second = (
            value_and_gradient(
                lambda x: rope_attention_packed(x, groups, prefix_tokens=3, backend="triton"),
                x,
                dout,
            )
            for x in (packed, strided)
        )
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        alone = [exact(*one, 3) for one in sets]
        want = [torch.cat([pair[i].flatten(0, 1) for pair in alone]) for i in (0, 1)]
        check(first, want, torch.finfo(torch.float32).eps)

    def test_compiles_whole(self):
        qkv, sin, cos, dout = example(20, 5, 32)
        function = lambda x: rope_attention(x, sin, cos, prefix_tokens=5, backend="triton")  # noqa: E731
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            value_and_gradient(compiled, qkv, dout),
            value_and_gradient(function, qkv, dout),
            rtol=0,
            atol=0,
        )

    def test_opcheck(self):
        qkv, sin, cos, _ = example(20, 5, 32)
        arguments = [sin], [cos], [1], [20], 5, 0.2, False, True
        torch.library.opcheck(rope_attention_op, (qkv.flatten(0, 1).requires_grad_(), *arguments))

    def test_inputs_the_kernels_do_not_take_are_named(self):
        for width, dtype, sentence in (
            (48, torch.float32, "head width 48"),
            (32, torch.float64, "torch.float64"),
        ):
            qkv, sin, cos, _ = example(9, 0, width, dtype=dtype)
            with pytest.raises(ValueError, match=f"backend='triton' cannot run here: {sentence}"):
                rope_attention(qkv, sin, cos, backend="triton")

    def test_long_and_short_crops_take_their_own_path(self, monkeypatch):
        """By backend "auto" on a GPU: up to `longest` tokens the kernels, beyond torch."""
        module = importlib.import_module("dinov3core.ops.rope_attention")  # ops holds the function
        monkeypatch.setattr(dispatch, "is_gpu", lambda device: True)
        monkeypatch.setattr(module, "longest_sequence", lambda qkv: 20)
        fused, triton_attention = [], module.TritonAttention.apply
        monkeypatch.setattr(
            module.TritonAttention,
            "apply",
            lambda x, packing, scale: fused.append(packing) or triton_attention(x, packing, scale),
        )
        sets = [example(tokens, 3, 32, images=2, seed=tokens) for tokens in (70, 19, 24)]
        packed = torch.cat([qkv.flatten(0, 1) for qkv, *_ in sets])
        dout = torch.cat([dout.flatten(0, 1) for *_, dout in sets])
        groups = [(len(qkv), sin, cos) for qkv, sin, cos, _ in sets]
        ours = value_and_gradient(
            lambda x: rope_attention_packed(x, groups, prefix_tokens=3), packed, dout
        )
        alone = [exact(*one, 3) for one in sets]
        want = [torch.cat([pair[i].flatten(0, 1) for pair in alone]) for i in (0, 1)]
        check(ours, want, torch.finfo(torch.float32).eps)
        assert [group.length for packing in fused for group in packing.groups] == [19]

    @pytest.mark.parametrize(("longest", "width"), [(640, 64), (450, 128)])
    def test_every_pair_of_high_resolution_crops_is_split(self, longest, width, monkeypatch):
        """Global crops of 512 and 768 px go to torch, local ones of 112 to 336 px to the kernels.

        By the table of an H100, as `launch.ROPE_ATTENTION` has it. Nothing is computed.
        """
        assert launch.ROPE_ATTENTION["sm_90", width].longest == longest
        module = importlib.import_module("dinov3core.ops.rope_attention")
        monkeypatch.setattr(dispatch, "is_gpu", lambda device: True)
        monkeypatch.setattr(module, "longest_sequence", lambda qkv: longest)
        taken = []

        def taking(name):
            def attend(qkv, packing, scale):
                taken.append((name, [group.length for group in packing.groups]))
                return qkv[:, 0]

            return attend

        for name in ("TritonAttention", "CpuAttention"):
            monkeypatch.setattr(getattr(module, name), "without_gradient", taking(name))
        for side, local in ((32, 7), (48, 7), (48, 10), (48, 14), (48, 21)):
            tables = [torch.zeros(n * n, width, dtype=torch.bfloat16) for n in (side, local)]
            groups = [(1, tables[0], tables[0]), (2, tables[1], tables[1])]
            tokens = side**2 + 5 + 2 * (local**2 + 5)
            qkv = torch.zeros(tokens, 3, 1, width, dtype=torch.bfloat16)
            assert rope_attention_packed(qkv, groups, prefix_tokens=5).shape == (tokens, 1, width)
            assert taken == [
                ("CpuAttention", [side**2 + 5]),
                ("TritonAttention", [local**2 + 5]),
            ]
            taken.clear()

    @pytest.mark.parametrize("tokens", [20, 70])
    def test_tables_of_unlike_strides(self, tokens):
        """The kernels step through sin and cos by one stride."""
        qkv, sin, cos, dout = example(tokens, 5, 32)
        wide = torch.stack([sin, sin], 1)[:, 0]
        sparse = torch.stack([cos, cos], -1)[..., 0]
        want = exact(qkv, sin, cos, dout, 5)
        for s, c in ((wide, cos), (sin, sparse), (sin.T.clone().T, cos)):
            ours = value_and_gradient(
                lambda x, s=s, c=c: rope_attention(x, s, c, prefix_tokens=5, backend="triton"),
                qkv,
                dout,
            )
            check(ours, want, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("interleaved", [False, True])
def test_split_and_merge(interleaved):
    """The kernels keep the channel order; torch's path may not, so scores are compared, and v, and
    the way back.
    """
    sets = [
        example(tokens, 2, 32, images=images, heads=2, seed=tokens)
        for tokens, images in ((40, 1), (6, 3))
    ]
    qkv = torch.cat([x.flatten(0, 1) for x, *_ in sets])
    groups = (PackedGroup(len(x), x.shape[1], sin, cos) for x, sin, cos, _ in sets)
    packing = Packing(tuple(groups), 2, interleaved)
    q, k, v = rope.split(qkv, packing)
    rotation = "interleaved" if interleaved else "half"
    for x, want in ((q, 0), (k, 1)):
        start = 0
        for whole, sin, cos, _ in sets:
            turned = reference.rope_rotate(whole[:, :, want], sin, cos, 2, rotation).flatten(0, 1)
            torch.testing.assert_close(x[start : start + len(turned)], turned)
            start += len(turned)
    torch.testing.assert_close(v, qkv[:, 2], rtol=0, atol=0)
    torch.testing.assert_close(
        rope.merge(q, k, v, packing), qkv
    )  # a rotation's transpose is its inverse
    flat = packing.flat()
    torch.testing.assert_close(rope_merge_op(*rope_split_op(qkv, **flat), **flat), qkv)
    sparse = packing.with_tables([torch.stack([t, t], -1)[..., 0] for t in packing.tables])
    torch.testing.assert_close(rope.split(qkv, sparse), (q, k, v), rtol=0, atol=0)


class Launches:
    """Stands for a kernel and notes the functions of this project that led to its launch."""

    def __init__(self, seen):
        self.seen = seen

    def __getitem__(self, grid):
        return self.note

    def note(self, *arguments, **options):
        rooms = (Path(launch.__file__).parent, Path(packing_file.__file__).parent)
        frames = [f for f in inspect.stack()[1:] if Path(f.filename).parent in rooms]
        self.seen.append([frame.function for frame in frames])


@pytest.mark.parametrize("through_op", [False, True])
def test_four_calls_from_the_public_name_to_a_kernel(monkeypatch, through_op):
    seen = []
    for module, name in (
        (kernels, "_rope_attention_resident_kernel"),
        (backward_kernels, "_rope_attention_backward_one_tile_kernel"),
    ):
        monkeypatch.setattr(module, name, Launches(seen))
    qkv, sin, cos, _ = example(20, 5, 32)
    mode = FlopCounterMode(display=False) if through_op else contextlib.nullcontext()
    with mode:
        out = rope_attention(qkv.requires_grad_(), sin, cos, prefix_tokens=5, backend="triton")
        out.sum().backward()
    forward, backward = seen
    inner = "rope_attention_op" if through_op else "forward"
    assert forward == ["forward", inner, "_attend", "rope_attention"]  # and the launch: 4 calls
    inner = ["rope_attention_backward_op", "_differentiate"] if through_op else ["backward"]
    assert backward == ["backward", *inner]


def test_kernels_are_told_apart_in_a_profile():
    """Those that are launched end in _kernel, as no device function does; no name comes twice."""
    files = {Path(module.__file__) for module in (rope, kernels, backward_kernels)}
    launched = {build.fn.fn for build in shipped() if Path(code_of(build).co_filename) in files}
    names = [function.__name__ for function in launched]
    assert len(set(names)) == len(names) == 6
    assert all(name.endswith("_kernel") for name in names)
    for module in (rope, kernels, backward_kernels):
        others = (value.fn for value in vars(module).values() if hasattr(value, "arg_names"))
        marked = {f for f in others if f.__name__.endswith("_kernel")}
        assert marked <= launched


def code_of(build):
    return build.fn.fn.__code__


class TestLaunch:
    def test_a_gpu_without_a_table_is_told_so(self, monkeypatch):
        monkeypatch.setattr(launch, "architecture", lambda device: "sm_80")
        problem = kernels.problem(torch.device("cpu"), torch.bfloat16, 64, torch.float32)
        assert problem == "no spill-free tiles are known for sm_80 at head width 64"

    @pytest.mark.parametrize(
        ("capability", "column"),
        [
            ((7, 5), "sm_75"),  # Turing: in no table
            ((8, 0), "sm_80"),
            ((8, 6), "sm_86"),  # RTX 30
            ((8, 7), "sm_86"),  # Orin
            ((8, 9), "sm_89"),  # RTX 40, L40S
            ((9, 0), "sm_90"),
            ((10, 0), "sm_100"),
            ((10, 3), "sm_100"),
            ((11, 0), "sm_100"),  # Thor: has tensor memory
            ((12, 0), "sm_120"),  # RTX 50: has none
            ((12, 1), "sm_120"),
        ],
    )
    def test_which_column_a_gpu_reads(self, monkeypatch, capability, column):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        launch.architecture.cache_clear()
        gpu = torch.device("cuda", 0)
        assert launch.architecture(gpu) == column
        launch.architecture.cache_clear()
        fused = ("sm_90", "sm_100", "gfx942")
        assert ((column, 64) in launch.ROPE_ATTENTION) == (column in fused)

    def test_tiles_of_gram_fit_everywhere(self):
        """Two tiles per stage at most lie in shared memory; spills are the compiler's to tell."""
        rows = ((torch.float32, 1024), (torch.bfloat16, 1024), (torch.bfloat16, 196))
        for target, limit in SHARED_LIMIT.items():
            for dtype, length in rows:
                choice = launch.gram(target, dtype, length)
                tile = choice.side * choice.channels * dtype.itemsize
                assert 2 * choice.stages * tile <= limit, (target, dtype, choice)
        smallest = launch.gram("sm_86", torch.float32, 1024)
        assert launch.gram("sm_75", torch.float32, 1024) == smallest

    @pytest.mark.parametrize("length", range(1, 700, 13))
    def test_tiles_hold_every_row_once(self, length):
        for entry in launch.ROPE_ATTENTION.values():
            _, sizes, _ = kernels._plan(entry, length, 5)
            if "A" in sizes:
                remainder = length - sizes["A"] - sizes["B"]
            else:
                remainder = tiles.front_remainder(length, sizes["BLOCK_N"])
                assert (length - remainder) % sizes["BLOCK_N"] == 0
                assert sizes["PREFIX_IN_LOOP"] == (remainder < 5)
            assert 1 <= remainder <= sizes["R"]
            _, sizes, _ = backward_kernels._plan(entry, length, 5)
            assert sizes.get("BLOCK", 64) == 64 and (length <= 64) == ("BLOCK" in sizes)

    def test_a_tuned_file_replaces_entries(self, tmp_path):
        entry = launch.ROPE_ATTENTION["sm_90", 64]
        path = tmp_path / "folder" / "launch.json"
        launch.write_file(path, {("sm_90", 64): entry})
        assert launch.read_file(path) == {("sm_90", 64): entry}
        table = json.loads(path.read_text())
        del table["rope_attention"]["sm_90/64"]["longest"]
        path.write_text(json.dumps(table))
        with pytest.raises(ValueError, match="tune again"):
            launch.read_file(path)
