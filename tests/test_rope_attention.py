"""rope_table and rope_attention against mathematics in float64, and the promises of the op to
torch.
"""

import math

import pytest
import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from dinov3core.ops import reference, rope_attention, rope_attention_packed, rope_table
from dinov3core.ops.packing import PackedGroup, Packing
from dinov3core.ops.rope import (
    RopeDraws,
    augment_coordinates,
    rope_coordinates,
    rope_draws,
    rope_periods,
)
from dinov3core.ops.rope_attention_op import rope_attention_op
from dinov3core.ops.rope_split import (
    rope_merge_op,
    rope_split_op,
    sdpa_attention,
)

LENGTHS = [(1, 1), (2, 0), (37, 1), (54, 5), (201, 5), (261, 0)]  # (tokens, prefix)


def example(tokens, prefix, width, *, images=2, heads=2, dtype=torch.float32, seed=0):
    """qkv [B, N, 3, H, d], tables of a 1 x P grid turned by random shifts, d(out); all from one
    generator.
    """
    g = torch.Generator().manual_seed(seed)
    qkv = torch.randn(images, tokens, 3, heads, width, generator=g, dtype=torch.float64)
    angles = (
        torch.randn(tokens - prefix, width // 2, generator=g, dtype=torch.float64).mul(3).tile(2)
    )
    dout = torch.randn(images, tokens, heads, width, generator=g, dtype=torch.float64)
    return qkv.to(dtype), angles.sin().to(dtype), angles.cos().to(dtype), dout.to(dtype)


def value_and_gradient(function, qkv, dout):
    leaf = qkv.detach().clone().requires_grad_()
    out = function(leaf)
    out.backward(dout)
    return out.detach(), leaf.grad


def rms(x):
    return x.double().square().mean().sqrt()


def check_contract(ours, plain, exact, roundings=2):
    """At most twice the error of the plain formula in the same dtype, plus two roundings of the
    result.

    In root mean square: the maximum of 10,000 errors is decided by one of them, in either formula's
        favour.
    """
    for got, same_dtype, want in zip(ours, plain, exact, strict=True):
        floor = roundings * torch.finfo(got.dtype).eps * rms(want)
        assert rms(got - want) <= 2 * rms(same_dtype - want) + floor


class TestTable:
    def test_every_entry_is_the_sine_of_its_angle(self):
        height, width, head_dim = 3, 5, 16
        sin, cos = rope_table(height, width, head_dim, normalize="max", base=100.0)
        for i in range(height):
            for j in range(width):
                for k in range(head_dim // 4):
                    for axis, position in enumerate((i, j)):
                        angle = (
                            2 * math.pi * (2 * (position + 0.5) / 5 - 1) / 100 ** (4 * k / head_dim)
                        )
                        for column in (axis * 4 + k, axis * 4 + k + 8):
                            assert sin[i * width + j, column] == pytest.approx(
                                math.sin(angle), abs=2e-6
                            )
                            assert cos[i * width + j, column] == pytest.approx(
                                math.cos(angle), abs=2e-6
                            )

    @pytest.mark.parametrize(
        ("normalize", "last"),
        [("separate", [0.5, 0.75]), ("max", [-0.25, 0.75]), ("min", [0.5, 2.5])],
    )
    def test_normalisation_by_each_side_the_longer_or_the_shorter(self, normalize, last):
        coordinates = rope_coordinates(2, 4, normalize=normalize)
        assert coordinates[-1].tolist() == last
        assert coordinates[1, 0] == coordinates[0, 0] < coordinates[4, 0]  # row-major, y first

    def test_periods_by_base_and_by_range(self):
        assert rope_periods(16).tolist() == pytest.approx([1, 10**0.5, 10, 10**1.5])
        by_range = rope_periods(16, base=None, min_period=0.5, max_period=8.0)
        assert by_range.tolist() == pytest.approx(
            [0.5, 0.5 * 16 ** (1 / 3), 0.5 * 16 ** (2 / 3), 8.0]
        )

    def test_bfloat16_rounds_every_step(self):
        assert rope_periods(64, dtype=torch.bfloat16).tolist()[:4] == [1, 1.3359375, 1.78125, 2.375]
        y = ((torch.arange(3) + 0.5).bfloat16() / 3).bfloat16()
        coordinate = ((2 * y).bfloat16() - 1).bfloat16()
        assert torch.equal(rope_coordinates(3, 1, dtype=torch.bfloat16)[:, 0], coordinate)
        sin, _ = rope_table(3, 1, 4, dtype=torch.bfloat16)
        angle = (2 * math.pi * coordinate.float()).bfloat16().float()
        assert torch.equal(sin[:, 0], angle.sin().bfloat16())

    def test_given_periods_are_used_as_they_are(self):
        sin, _ = rope_table(1, 4, 8, periods=torch.tensor([1.0, 2.0]))
        x = torch.tensor([-0.75, -0.25, 0.25, 0.75])
        torch.testing.assert_close(
            sin[:, 2:4], torch.sin(2 * math.pi * x[:, None] / torch.tensor([1.0, 2.0]))
        )
        with pytest.raises(ValueError, match=r"expected 2 periods .* got shape \(3,\)"):
            rope_table(1, 4, 8, periods=torch.ones(3))

    def test_augmentation_shifts_then_jitters_then_rescales(self):
        draws = RopeDraws(torch.tensor([0.5, -0.5]), torch.tensor([2.0, 4.0]), torch.tensor([3.0]))
        assert augment_coordinates(torch.tensor([[0.25, 0.25]]), draws).tolist() == [
            [0.75 * 6, -0.25 * 12]
        ]
        assert augment_coordinates(torch.ones(1, 2), RopeDraws()).tolist() == [[1, 1]]

    def test_draws_are_bounded_repeatable_and_only_made_where_asked(self):
        g = torch.Generator().manual_seed(1)
        before = g.get_state()
        rope_table(2, 2, 8, generator=g)
        assert torch.equal(g.get_state(), before)
        many = [rope_draws(shift=0.3, jitter=1.5, rescale=2.0, generator=g) for _ in range(300)]
        shift, jitter, rescale = (
            torch.stack([getattr(draw, name) for draw in many]) for name in RopeDraws._fields
        )
        assert shift.abs().max() <= 0.3 < 1.1 * shift.abs().max()
        assert 1 / 1.5 <= jitter.min() < 0.7 and 1.45 < jitter.max() <= 1.5
        assert 0.5 <= rescale.min() < 0.52 and 1.95 < rescale.max() <= 2
        again = rope_table(
            2, 3, 8, shift=0.3, jitter=1.5, rescale=2.0, generator=torch.Generator().manual_seed(5)
        )
        parts = rope_draws(
            shift=0.3, jitter=1.5, rescale=2.0, generator=torch.Generator().manual_seed(5)
        )
        by_hand = augment_coordinates(rope_coordinates(2, 3), parts)
        torch.testing.assert_close(again[0][:, 0], torch.sin(2 * math.pi * by_hand[:, 0]))

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ({"head_dim": 6}, "positive multiple of 4, got 6"),
            ({"height": 0}, "at least 1 x 1 patches, got 0 x 2"),
            ({"normalize": "both"}, "got 'both'"),
            ({"min_period": 1.0, "max_period": 2.0}, "base=None, got base=100.0"),
            ({"base": None}, "got base=None, min_period=None"),
        ],
    )
    def test_contradictions_are_refused(self, arguments, sentence):
        with pytest.raises(ValueError, match=sentence):
            rope_table(**{"height": 2, "width": 2, "head_dim": 8} | arguments)


class TestValues:
    @pytest.mark.parametrize("width", [32, 64, 128])
    @pytest.mark.parametrize(("tokens", "prefix"), LENGTHS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_against_float64(self, tokens, prefix, width, dtype):
        qkv, sin, cos, dout = example(tokens, prefix, width, dtype=dtype)
        tables = (
            (sin.double(), cos.double()) if dtype == torch.float64 else (sin.float(), cos.float())
        )

        def formula(x, dtype=torch.float64):
            return reference.rope_attention(x, *(t.to(dtype) for t in tables), prefix_tokens=prefix)

        ours = value_and_gradient(
            lambda x: rope_attention(x, *tables, prefix_tokens=prefix), qkv, dout
        )
        plain = value_and_gradient(lambda x: formula(x, tables[0].dtype), qkv, dout)
        exact = value_and_gradient(formula, qkv.double(), dout.double())
        assert ours[0].dtype == ours[1].dtype == dtype
        check_contract(
            ours, plain, exact, roundings=16 if dtype == torch.float64 else 2
        )  # there plain is exact

    @pytest.mark.parametrize("scale", [1e-3, 30.0])
    def test_flat_and_one_hot_probabilities(self, scale):
        qkv, sin, cos, dout = example(54, 5, 32)
        options = {"prefix_tokens": 5, "scale": scale}
        ours = value_and_gradient(lambda x: rope_attention(x, sin, cos, **options), qkv, dout)
        plain, exact = (
            value_and_gradient(
                lambda x, d=d: reference.rope_attention(x, sin.to(d), cos.to(d), **options),
                qkv.to(d),
                dout.to(d),
            )
            for d in (torch.float32, torch.float64)
        )
        check_contract(ours[:1], plain[:1], exact[:1])
        # The gradient takes P = exp(S - lse) from the stored lse, so P carries a relative error of
        # eps * |lse|.
        lse = rope_attention_op(qkv.flatten(0, 1), [sin], [cos], [2], [54], 5, scale, False, False)[
            1
        ]
        assert rms(ours[1] - exact[1]) <= torch.finfo(torch.float32).eps * lse.abs().max() * rms(
            exact[1]
        )

    @pytest.mark.parametrize("rotation", ["half", "interleaved"])
    def test_scores_depend_on_relative_position_only(self, rotation):
        qkv, *_ = example(9, 0, 16, dtype=torch.float64)
        angles = torch.arange(9.0, dtype=torch.float64)[:, None] * torch.rand(
            8, dtype=torch.float64
        )
        outs = [
            rope_attention(qkv, turned.sin(), turned.cos(), rotation=rotation)
            for turned in (angles.tile(2), (angles + 1.7).tile(2))
        ]
        torch.testing.assert_close(*outs)

    def test_interleaved_is_half_with_permuted_channels(self):
        qkv, sin, cos, _ = example(20, 3, 16, dtype=torch.float64)
        half_order = torch.cat([torch.arange(0, 16, 2), torch.arange(1, 16, 2)])
        permuted = qkv.clone()
        permuted[:, :, :2] = qkv[:, :, :2, :, half_order]
        torch.testing.assert_close(
            rope_attention(qkv, sin, cos, prefix_tokens=3, rotation="interleaved"),
            rope_attention(permuted, sin, cos, prefix_tokens=3),
        )

    def test_bfloat16_tables_round_like_bfloat16_arithmetic(self):
        qkv, sin, cos, dout = example(30, 5, 32)
        tables = sin.bfloat16(), cos.bfloat16()

        def written_out(x):
            q, k, v = x.unbind(2)
            return torch.nn.functional.scaled_dot_product_attention(
                *(reference.rope_rotate(y, *tables, 5).transpose(1, 2) for y in (q, k)),
                v.transpose(1, 2),
            ).transpose(1, 2)

        ours = value_and_gradient(lambda x: rope_attention(x, *tables, prefix_tokens=5), qkv, dout)
        for got, want in zip(ours, value_and_gradient(written_out, qkv, dout), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)

    def test_without_tables_nothing_is_rotated(self):
        qkv, _, _, dout = example(30, 0, 32, dtype=torch.float64)
        ours = value_and_gradient(lambda x: rope_attention(x, None, None), qkv, dout)
        want = value_and_gradient(lambda x: reference.rope_attention(x, None, None), qkv, dout)
        torch.testing.assert_close(ours, want)

    def test_strided_inputs_and_an_expanded_gradient(self):
        wide, sin, cos, _ = example(12, 2, 32, images=3)
        for view in (
            wide[:, :, :, :, ::2],
            wide[:, 1:],
            wide.transpose(0, 1).contiguous().transpose(0, 1),
            wide[1:],
        ):
            width = view.shape[-1]
            s, c = sin[-(view.shape[1] - 2) :, :width], cos[-(view.shape[1] - 2) :, :width]
            dout = torch.ones(1).expand(view.shape[0], view.shape[1], 2, width)
            results = []
            for x in (view.detach(), view.detach().contiguous()):
                x = x.requires_grad_()
                out = rope_attention(x, s, c, prefix_tokens=2)
                results.append((out, *torch.autograd.grad(out, x, dout)))
            torch.testing.assert_close(*results, rtol=0, atol=0)

    def test_packed_crops_are_the_crops_one_by_one(self):
        sets = [
            example(tokens, 3, 32, images=images, seed=images)
            for tokens, images in ((19, 2), (7, 5), (4, 1))
        ]
        packed = torch.cat([qkv.flatten(0, 1) for qkv, *_ in sets]).requires_grad_()
        groups = [(len(qkv), sin, cos) for qkv, sin, cos, _ in sets]
        out = rope_attention_packed(packed, groups, prefix_tokens=3)
        out.backward(torch.cat([dout.flatten(0, 1) for *_, dout in sets]))
        alone = [
            value_and_gradient(
                lambda x, s=sin, c=cos: rope_attention(x, s, c, prefix_tokens=3), qkv, dout
            )
            for qkv, sin, cos, dout in sets
        ]
        torch.testing.assert_close(out, torch.cat([value.flatten(0, 1) for value, _ in alone]))
        torch.testing.assert_close(
            packed.grad, torch.cat([gradient.flatten(0, 1) for _, gradient in alone])
        )

    def test_an_empty_batch(self):
        qkv, sin, cos, _ = example(9, 2, 16, images=0)
        assert rope_attention(qkv, sin, cos, prefix_tokens=2).shape == (0, 9, 2, 16)

    @pytest.mark.parametrize("interleaved", [False, True])
    def test_the_path_of_other_devices_gives_the_same(self, interleaved):
        qkv, sin, cos, dout = example(25, 5, 32)
        rotation = "interleaved" if interleaved else "half"
        ours = value_and_gradient(
            lambda x: rope_attention(x, sin, cos, prefix_tokens=5, rotation=rotation).flatten(0, 1),
            qkv,
            dout.flatten(0, 1),
        )
        packing = Packing((PackedGroup(2, 25, sin, cos),), 5, interleaved)
        other = value_and_gradient(
            lambda x: sdpa_attention(x.flatten(0, 1), packing, 32**-0.5), qkv, dout.flatten(0, 1)
        )
        torch.testing.assert_close(other, ours, rtol=1e-5, atol=1e-5)


class TestPromises:
    """Promises to torch: schemas, tracing, checkpointing, autocast, counting, one derivative."""

    def arguments(self):
        (qkv, s1, c1, _), (short, s2, c2, _) = example(9, 2, 32), example(5, 2, 32, images=3)
        packed = torch.cat([qkv.flatten(0, 1), short.flatten(0, 1)]).requires_grad_()
        return packed, [s1, s2], [c1, c2], [2, 3], [9, 5], 2, 0.25, False, False

    def packed(self, x, **options):
        _, (s1, s2), (c1, c2), *_ = self.arguments()
        return rope_attention_packed(x, [(2, s1, c1), (3, s2, c2)], prefix_tokens=2, **options)

    def test_opcheck(self):
        torch.library.opcheck(rope_attention_op, self.arguments())

    def test_opcheck_of_the_rotation(self):
        qkv, sins, coss, counts, lengths, prefix, *_ = self.arguments()
        rest = sins, coss, counts, lengths, prefix, False
        torch.library.opcheck(rope_split_op, (qkv, *rest))
        parts = (x.detach().requires_grad_() for x in rope_split_op(qkv, *rest))
        torch.library.opcheck(rope_merge_op, (*parts, *rest))

    def test_compiles_whole_and_for_any_batch(self):
        compiled = torch.compile(
            lambda x, s, c: rope_attention(x, s, c, prefix_tokens=5),
            fullgraph=True,
            dynamic=True,
            backend="aot_eager",
        )
        for images in (2, 3, 4):
            qkv, sin, cos, dout = example(21, 5, 32, images=images)
            ours = value_and_gradient(lambda x, s=sin, c=cos: compiled(x, s, c), qkv, dout)
            eager = value_and_gradient(
                lambda x, s=sin, c=cos: rope_attention(x, s, c, prefix_tokens=5), qkv, dout
            )
            torch.testing.assert_close(ours, eager, rtol=0, atol=0)

    def test_selective_checkpointing_keeps_or_repeats_the_op(self):
        x = self.arguments()[0]
        want = torch.autograd.grad(self.packed(x).square().sum(), x)
        for policy in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE):
            seen = []

            def decide(context, op, *args, policy=policy, seen=seen, **kwargs):
                seen.append((op, context.is_recompute))
                return (
                    policy
                    if op is torch.ops.dinov3core.rope_attention.default
                    else CheckpointPolicy.PREFER_RECOMPUTE
                )

            out = checkpoint(
                lambda y: self.packed(y).square(),
                x,
                use_reentrant=False,
                context_fn=lambda decide=decide: create_selective_checkpoint_contexts(decide),
            )
            torch.testing.assert_close(torch.autograd.grad(out.sum(), x), want, rtol=0, atol=0)
            assert (torch.ops.dinov3core.rope_attention.default, False) in seen

    def test_meta_tensors_give_shapes(self):
        sin, cos = rope_table(2, 4, 8, device="meta")
        qkv = torch.randn(2, 9, 3, 2, 8, device="meta", requires_grad=True)
        out = rope_attention(qkv, sin, cos, prefix_tokens=1)
        assert out.is_meta and out.shape == (2, 9, 2, 8)
        (gradient,) = torch.autograd.grad(out.sum(), qkv)
        assert gradient.is_meta and gradient.shape == qkv.shape

    def test_tables_changed_in_place_are_read_again(self):
        qkv = torch.randn(1, 5, 3, 2, 8)
        sin, cos = rope_table(1, 4, 8)
        before = rope_attention(qkv, sin, cos, prefix_tokens=1)
        sin.zero_(), cos.fill_(1)
        unturned = rope_attention(qkv, None, None)
        assert not torch.equal(before, unturned)
        torch.testing.assert_close(rope_attention(qkv, sin, cos, prefix_tokens=1), unturned)
        sin.data, cos.data = rope_table(1, 4, 8)
        torch.testing.assert_close(rope_attention(qkv, sin, cos, prefix_tokens=1), before)

    @pytest.mark.parametrize("through_op", [False, True])
    def test_tables_changed_before_the_backward_are_refused(self, through_op):
        x, sins, coss, *rest = self.arguments()
        groups = [(2, sins[0], coss[0]), (3, sins[1], coss[1])]
        if through_op:
            out = rope_attention_op(x, sins, coss, *rest)[0]
        else:
            out = rope_attention_packed(x, groups, prefix_tokens=2)
        sins[0].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    def test_a_forward_in_inference_mode_does_not_spoil_a_later_step(self):
        x = self.arguments()[0]
        sin, cos = rope_table(2, 2, 32)
        with torch.inference_mode():
            first = rope_attention(x[:5][None], sin, cos, prefix_tokens=1)
        out = rope_attention(x[:5][None], sin, cos, prefix_tokens=1)
        out.sum().backward()
        torch.testing.assert_close(out, first, rtol=0, atol=0)

    def test_no_attribute_is_left_on_the_tables(self):
        sin, cos = rope_table(2, 2, 32)
        before = dict(vars(sin)), dict(vars(cos))
        rope_attention(torch.randn(1, 5, 3, 2, 32), sin, cos, prefix_tokens=1)
        assert (vars(sin), vars(cos)) == before

    def test_plain_calls_and_calls_of_the_op_agree(self):
        x, *rest = self.arguments()
        dout = torch.randn(x.shape[0], *x.shape[2:])
        through_op = value_and_gradient(lambda y: rope_attention_op(y, *rest)[0], x, dout)
        plain = value_and_gradient(lambda y: self.packed(y, scale=0.25), x, dout)
        torch.testing.assert_close(plain, through_op, rtol=0, atol=0)

    def test_only_qkv_out_and_the_log_sums_are_saved(self):
        x, *rest = self.arguments()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            out = rope_attention_op(x, *rest)[0]
        tables = 4 * 16 * 32  # (7 + 7 + 3 + 3 rows: the tables themselves, which the caller owns)
        assert sum(t.numel() for t in saved) <= x.numel() + out.numel() + out.numel() // 32 + tables

    def test_autocast_casts_qkv_and_leaves_the_tables(self):
        x, _, _, *_ = self.arguments()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = self.packed(x)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, self.packed(x.bfloat16()), rtol=0, atol=0)
        out.float().sum().backward()
        assert x.grad.dtype == torch.float32

    def test_flops(self):
        x = self.arguments()[0]
        with FlopCounterMode(display=False) as counter:
            self.packed(x).sum().backward()
        assert counter.get_total_flops() == (4 + 10) * 2 * 32 * (2 * 9**2 + 3 * 5**2)

    @pytest.mark.parametrize("through_op", [False, True])
    def test_a_second_derivative_is_refused(self, through_op):
        x, *rest = self.arguments()
        out = rope_attention_op(x, *rest)[0] if through_op else self.packed(x)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="rope_attention can be differentiated once"):
            first.sum().backward()


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (
                {"qkv": torch.zeros(2, 9, 2, 2, 8)},
                r"expected qkv \[B, N, 3, H, d\], got shape \(2, 9, 2, 2, 8\)",
            ),
            (
                {"qkv": torch.zeros(2, 9, 3, 2, 8, dtype=torch.int32)},
                "expected a floating dtype, got torch.int32",
            ),
            ({"prefix_tokens": 1}, "got N=9, prefix_tokens=1 and 7 rows"),
            ({"cos": None}, "or None for both"),
            (
                {"sin": torch.zeros(7, 4), "cos": torch.zeros(7, 4)},
                r"expected sin and cos \[P, 8\], got \(7, 4\)",
            ),
            ({"sin": torch.zeros(7, 8).double()}, "of one dtype on cpu, got torch.float64"),
            ({"sin": torch.zeros(7, 8, requires_grad=True)}, "expected constant tables"),
            ({"rotation": "full"}, "got 'full'"),
            ({"backend": "cuda"}, "got 'cuda'"),
            ({"scale": 0.0}, "expected scale > 0, got 0.0"),
            (
                {
                    "qkv": torch.zeros(2, 9, 3, 2, 7),
                    "sin": torch.zeros(7, 7),
                    "cos": torch.zeros(7, 7),
                },
                "even head width",
            ),
        ],
    )
    def test_one_sentence(self, change, sentence):
        given = {
            "qkv": torch.zeros(2, 9, 3, 2, 8),
            "sin": torch.zeros(7, 8),
            "cos": torch.zeros(7, 8),
        }
        given |= {"prefix_tokens": 2} | change
        with pytest.raises(ValueError, match=sentence):
            rope_attention(given.pop("qkv"), given.pop("sin"), given.pop("cos"), **given)

    def test_packed_sentences(self):
        table = torch.zeros(7, 8)
        with pytest.raises(
            ValueError, match=r"hold T=18 tokens, got 9 \(counts \[1\], lengths \[9\]\)"
        ):
            rope_attention_packed(torch.zeros(18, 3, 2, 8), [(1, table, table)], prefix_tokens=2)
        with pytest.raises(ValueError, match=r"expected qkv \[T, 3, H, d\]"):
            rope_attention_packed(torch.zeros(18, 2, 8), [(2, table, table)], prefix_tokens=2)
        with pytest.raises(ValueError, match="one or more groups"):
            rope_attention_packed(torch.zeros(18, 3, 2, 8), [(2, None, None)], prefix_tokens=2)

    def test_xformers_is_asked_for_by_name(self):
        if torch.cuda.is_available():
            pytest.skip("runs where xformers can")
        try:
            import xformers  # noqa: F401
        except ImportError:
            with pytest.raises(ValueError, match="expected xformers for backend='xformers'"):
                rope_attention(torch.zeros(1, 9, 3, 2, 8), None, None, backend="xformers")
