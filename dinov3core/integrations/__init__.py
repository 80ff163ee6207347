"""Our ops in models that people already use.

`integrations.transformers` and `integrations.timm` change a model in place, and back.

In a ViT of your own, the attention becomes

    class Attention(nn.Module):
        def __init__(self, width, heads, prefix_tokens=1):
            super().__init__()
            self.heads, self.prefix_tokens = heads, prefix_tokens
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

        def forward(self, x, rows, columns):  # x [B, prefix_tokens + rows * columns, width]
            qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, N, 3, H, d], as it comes
            sin, cos = rope_table(rows, columns, qkv.shape[-1], device=x.device)
            out = rope_attention(qkv, sin, cos, prefix_tokens=self.prefix_tokens)
            return self.proj(out.flatten(2))

with `from dinov3core.ops import rope_attention, rope_table`. Without rotation pass None for sin and
cos; a model that keeps its own tables passes those ([P, d], columns k and k + d / 2 equal;
rotation="interleaved" for neighbours).
"""
