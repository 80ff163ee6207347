"""What the ops are compared with: each one, and a whole training step, written plainly in torch.

This is what somebody who knows the papers and torch would write without fused kernels: rotated
copies of q and k joined with the prefix tokens, a Gram matrix per side, a Sinkhorn matrix in
float32, log-softmax times probabilities, one pass through the backbone per crop size, a loop over
parameters for the moving average. tests/test_benchmarks.py holds the losses and gradients equal to
ours. float64 inputs stay float64 so that the comparison can be sharp.

Shapes: B images, S student and T teacher crops, N tokens, P patches, R rows, M masked patches, K
prototypes, H heads, d head width, D width.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rope_table(
    height: int, width: int, head_dim: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(sin, cos) [height * width, head_dim] of patch centres in [-1, 1] (DINOv3 paper, 3.2)."""
    periods = base ** (torch.arange(head_dim // 4, device=device, dtype=dtype) * 4 / head_dim)
    y, x = (
        2 * (torch.arange(n, device=device, dtype=dtype) + 0.5) / n - 1 for n in (height, width)
    )
    centres = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)
    angles = (2 * math.pi * centres[:, :, None] / periods).flatten(1).tile(2)
    return angles.sin(), angles.cos()


def apply_rope(x_BHNd: Tensor, sin: Tensor, cos: Tensor, prefix: int) -> Tensor:
    """Rotate the tokens after `prefix` and join them with it again."""
    patches = x_BHNd[:, :, prefix:].to(sin.dtype)
    first, second = patches.chunk(2, -1)
    rotated = patches * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([x_BHNd[:, :, :prefix], rotated.to(x_BHNd.dtype)], dim=2)


def _heads(qkv: Tensor, sin: Tensor, cos: Tensor, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return apply_rope(q, sin, cos, prefix), apply_rope(k, sin, cos, prefix), v


def rope_then_sdpa(qkv: Tensor, sin: Tensor, cos: Tensor, prefix: int) -> Tensor:
    """qkv [B, N, 3, H, d] -> [B, N, H, d] through `scaled_dot_product_attention`."""
    return F.scaled_dot_product_attention(*_heads(qkv, sin, cos, prefix)).transpose(1, 2)


def rope_then_softmax(qkv: Tensor, sin: Tensor, cos: Tensor, prefix: int) -> Tensor:
    """The same with the scores written out: the plain formula."""
    q, k, v = _heads(qkv, sin, cos, prefix)
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


def rope_then_xformers(qkv: Tensor, sin: Tensor, cos: Tensor, prefix: int) -> Tensor:
    """The same through xformers' memory-efficient attention."""
    from xformers.ops import memory_efficient_attention

    q, k, v = (x.transpose(1, 2) for x in _heads(qkv, sin, cos, prefix))
    return memory_efficient_attention(q, k, v)


def gram_loss(
    student: Tensor, teacher: Tensor, per_image: bool = True, negatives: str = "keep"
) -> Tensor:
    """Mean squared difference of the Gram matrices of [B, P, D] (DINOv3 paper, section 4.2)."""
    student = F.normalize(_fp32(student), dim=-1)
    teacher = F.normalize(_fp32(teacher), dim=-1)
    if not per_image:
        student = student.flatten(0, -2)
        teacher = teacher.flatten(0, -2)
    gram_s = student @ student.mT
    gram_t = teacher @ teacher.mT
    if negatives == "clip":
        gram_s = gram_s.clamp(min=0)
    if negatives != "keep":
        gram_t = gram_t.clamp(min=0)
    return F.mse_loss(gram_s, gram_t)


@torch.no_grad()
def sinkhorn(logits_RK: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Balanced teacher probabilities [R, K] (Caron et al. 2020, SwAV, appendix)."""
    Q_KR = torch.exp(_fp32(logits_RK) / temperature).T
    K, R = Q_KR.shape
    Q_KR /= Q_KR.sum()
    for _ in range(iterations):
        Q_KR /= Q_KR.sum(dim=1, keepdim=True)
        Q_KR /= K
        Q_KR /= Q_KR.sum(dim=0, keepdim=True)
        Q_KR /= R
    return (Q_KR * R).T


def cross_entropy(logits_RK: Tensor, probabilities_RK: Tensor, temperature: float) -> Tensor:
    """Per row [R]."""
    return -(probabilities_RK * F.log_softmax(_fp32(logits_RK) / temperature, dim=-1)).sum(-1)


def linear_cross_entropy(
    features: Tensor, weight: Tensor, probabilities_RK: Tensor, temperature: float
) -> Tensor:
    """Per row [R], of the prototype layer's logits."""
    return cross_entropy(features @ weight.T, probabilities_RK, temperature)


def dino_loss(
    student_SBK: Tensor, teacher_TBK: Tensor, temperature: float, skip_same: bool = False
) -> Tensor:
    """Mean cross-entropy over all (student crop, teacher crop) pairs of an image."""
    log_q = F.log_softmax(_fp32(student_SBK) / temperature, dim=-1)
    pairs = -torch.einsum("sbk,tbk->st", log_q, teacher_TBK) / student_SBK.shape[1]
    if skip_same:
        other = ~torch.eye(*pairs.shape, dtype=torch.bool, device=pairs.device)
        return pairs[other].mean()
    return pairs.mean()


def ibot_loss(
    student_MK: Tensor, teacher_MK: Tensor, weights_M: Tensor, crops: int, temperature: float
) -> Tensor:
    """Weighted cross-entropy over masked patches, divided by the number of image-crops."""
    return (cross_entropy(student_MK, teacher_MK, temperature) * weights_M).sum() / crops


def koleo_loss(cls_BD: Tensor) -> Tensor:
    """-mean ln distance to the nearest neighbour (Sablayrolles et al. 2019)."""
    z = F.normalize(_fp32(cls_BD), eps=1e-8, dim=-1)
    similarity = z @ z.T
    similarity.fill_diagonal_(-1)
    return -torch.log(F.pairwise_distance(z, z[similarity.argmax(1)], eps=1e-8) + 1e-8).mean()


class QKV(nn.Linear):
    """The qkv projection with a masked key bias."""

    def __init__(self, width: int):
        super().__init__(width, 3 * width)
        self.register_buffer("bias_mask", torch.ones(3 * width))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * self.bias_mask)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = QKV(width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, sin: Tensor, cos: Tensor, prefix: int) -> Tensor:
        qkv = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1))
        return self.proj(rope_then_sdpa(qkv, sin, cos, prefix).flatten(2))


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, drop_path: float, eps: float):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, 4 * width)
        self.ls2 = LayerScale(width)

    def forward(self, x_BND: Tensor, sin: Tensor, cos: Tensor, prefix: int) -> Tensor:
        x_BND = self._add(x_BND, lambda x: self.ls1(self.attn(self.norm1(x), sin, cos, prefix)))
        return self._add(x_BND, lambda x: self.ls2(self.mlp(self.norm2(x))))

    def _add(self, x_BND: Tensor, branch) -> Tensor:
        """Residual with batch-subset stochastic depth: dropped images cost nothing."""
        if not (self.training and self.drop_path):
            return x_BND + branch(x_BND)
        images = len(x_BND)
        count = max(int(images * (1 - self.drop_path)), 1)
        chosen = torch.randperm(images, device=x_BND.device)[:count]
        update = branch(x_BND[chosen]).to(x_BND.dtype)
        return x_BND.index_add(0, chosen, update, alpha=images / count)


class VisionTransformer(nn.Module):
    """ViT with CLS, registers and RoPE; state-dict keys as ours."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        patch_size: int,
        registers: int,
        drop_path: float = 0.0,
        eps: float = 1e-5,
        rope_base: float = 100.0,
        rope_dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.prefix = 1 + registers
        self.head_dim = width // heads
        self.rope_base = rope_base
        self.rope_dtype = rope_dtype
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if registers:
            self.storage_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch_size, patch_size)})
        self.blocks = nn.ModuleList(Block(width, heads, drop_path, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps)

    def forward(self, images: Tensor, masks_BP: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """CLS [B, D] and patches [B, P, D]."""
        patches = self.patch_embed["proj"](images)
        grid = patches.shape[2:]
        patches = patches.flatten(2).mT
        if masks_BP is not None:
            patches = torch.where(masks_BP[..., None], self.mask_token.to(patches.dtype), patches)
        prefix = [self.cls_token, self.storage_tokens] if self.prefix > 1 else [self.cls_token]
        x = torch.cat([t.expand(len(images), -1, -1) for t in prefix] + [patches], dim=1)
        sin, cos = rope_table(*grid, self.head_dim, self.rope_base, self.rope_dtype, x.device)
        for block in self.blocks:
            x = block(x, sin, cos, self.prefix)
        x = self.norm(x)
        return x[:, 0], x[:, self.prefix :]


class Head(nn.Module):
    """MLP, unit norm, prototypes; state-dict keys as ours."""

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.last_layer = nn.Linear(bottleneck, prototypes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Networks(nn.Module):
    """A backbone with its two heads."""

    def __init__(self, backbone: nn.Module, dino_head: nn.Module, ibot_head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.dino_head = dino_head
        self.ibot_head = ibot_head


@dataclass(frozen=True)
class Weights:
    """The numbers of the objective."""

    global_crops: int = 2
    local_crops: int = 8
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    dino: float = 1.0
    ibot: float = 1.0
    koleo: float = 0.1
    gram: float = 0.0


class Step:
    """A training step on batches like ours, from teacher targets to the moving average.

    Args:
        student: with its heads; the teacher starts as a copy.
        optimizer: over the student's parameters.
        autocast_dtype: number type of the networks; None: their own.
        compiled: pass the networks and the losses through torch.compile.
    """

    def __init__(
        self,
        student: Networks,
        optimizer: torch.optim.Optimizer,
        weights: Weights,
        *,
        momentum: float = 0.992,
        clip: float = 3.0,
        autocast_dtype: torch.dtype | None = None,
        compiled: bool = False,
    ):
        self.student = student.train()
        self.teacher = copy.deepcopy(student).eval().requires_grad_(False)
        self.optimizer = optimizer
        self.weights = weights
        self.momentum = momentum
        self.clip = clip
        self.autocast_dtype = autocast_dtype
        self.terms = torch.compile(self._terms) if compiled else self._terms

    def _targets(self, crops) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher logits of CLS and masked patches, and all patches."""
        with torch.no_grad():
            cls, patches = self.teacher.backbone(crops.global_crops)
            masked = patches.flatten(0, 1)[crops.mask_indices]
            return self.teacher.dino_head(cls), self.teacher.ibot_head(masked), patches

    def _outputs(self, crops) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Student CLS and patches of the global crops; three kinds of logits."""
        student = self.student
        cls_global, patches = student.backbone(crops.global_crops, crops.masks)
        cls_local, _ = student.backbone(crops.local_crops)
        masked = patches.flatten(0, 1)[crops.mask_indices]
        logits = (
            student.dino_head(cls_global),
            student.dino_head(cls_local),
            student.ibot_head(masked),
        )
        return cls_global, patches, *logits

    def _terms(self, crops) -> dict[str, Tensor]:
        w = self.weights
        dtype, kind = self.autocast_dtype, crops.global_crops.device.type
        with torch.autocast(kind, dtype, enabled=dtype is not None):
            teacher_cls, teacher_masked, teacher_patches = self._targets(crops)
            cls, patches, logits_global, logits_local, logits_MK = self._outputs(crops)
        teacher_TBK = sinkhorn(teacher_cls, w.teacher_temperature).unflatten(
            0, (w.global_crops, -1)
        )
        teacher_MK = sinkhorn(teacher_masked, w.teacher_temperature)
        global_SBK, local_SBK = (
            x.unflatten(0, (-1, teacher_TBK.shape[1])) for x in (logits_global, logits_local)
        )
        images = len(crops.global_crops)
        terms = {
            "dino_global": dino_loss(
                global_SBK, teacher_TBK, w.student_temperature, skip_same=True
            ),
            "dino_local": dino_loss(local_SBK, teacher_TBK, w.student_temperature),
            "ibot": ibot_loss(
                logits_MK, teacher_MK, crops.mask_weights, images, w.student_temperature
            ),
            "koleo": sum(koleo_loss(x) for x in cls.chunk(w.global_crops)),
        }
        if w.gram:
            terms["gram"] = gram_loss(patches, teacher_patches)
        return terms

    def loss(self, crops) -> tuple[Tensor, dict[str, Tensor]]:
        """The total, pairs weighted by their number (DINOv3 paper, section 3), and its terms."""
        w = self.weights
        terms = self.terms(crops)
        pairs_global = w.global_crops * (w.global_crops - 1)
        pairs_local = w.global_crops * w.local_crops
        dino = (pairs_global * terms["dino_global"] + pairs_local * terms["dino_local"]) / (
            pairs_global + pairs_local
        )
        total = w.dino * dino + w.ibot * terms["ibot"] + w.koleo * terms["koleo"]
        if w.gram:
            total = total + w.gram * terms["gram"]
        return total, terms

    def step(self, crops) -> float:
        """One optimizer step; returns the loss."""
        self.optimizer.zero_grad()
        total, _ = self.loss(crops)
        total.backward()
        for module in self.student.children():
            nn.utils.clip_grad_norm_(module.parameters(), self.clip)
        self.optimizer.step()
        with torch.no_grad():
            for theirs, ours in zip(
                self.teacher.parameters(), self.student.parameters(), strict=True
            ):
                theirs.mul_(self.momentum).add_(ours, alpha=1 - self.momentum)
        return total.item()
