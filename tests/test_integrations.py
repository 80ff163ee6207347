"""The attention written out in the integrations' docstring runs as printed and is what it claims to
be.
"""

import textwrap

import torch
from torch import nn

from dinov3core import integrations
from dinov3core.ops import reference, rope_attention, rope_table


def test_the_printed_attention_runs_and_is_correct():
    text = integrations.__doc__
    code = textwrap.dedent(text[text.index("    class Attention") : text.index("\n\nwith `from")])
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    names = {"nn": nn, "rope_attention": rope_attention, "rope_table": rope_table}
    exec(code, names)
    torch.manual_seed(0)
    attention = names["Attention"](48, 3, prefix_tokens=5).double()
    x = torch.randn(2, 5 + 12, 48, dtype=torch.float64, requires_grad=True)
    got = attention(x, 3, 4)
    sin, cos = rope_table(3, 4, 16)
    qkv = attention.qkv(x).unflatten(-1, (3, 3, 16))
    want = attention.proj(
        reference.rope_attention(qkv, sin.double(), cos.double(), prefix_tokens=5).flatten(2)
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(got.square().sum(), x)
    (wanted,) = torch.autograd.grad(want.square().sum(), x)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)
