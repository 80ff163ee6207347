"""transformers' DINOv3 before and after `accelerate`: an attention layer and a whole model."""

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.cases import Case

SIZES = {  # images, side in pixels, width, blocks
    "dry": [(1, 32, 96, 1)],
    "cpu": [(4, 256, 384, 4), (16, 112, 384, 4)],
    "gpu": [(64, 256, 384, 12), (64, 256, 1024, 24), (128, 112, 384, 12)],
}


def transformers_cases(scale: str) -> list[Case]:
    """Both at every size; needs the transformers library."""
    return [case for size in SIZES[scale] for case in (_layer(*size), _model(*size))]


def _network(side: int, width: int, blocks: int) -> nn.Module:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64 or 1,
        num_register_tokens=4,
        image_size=side,
    )
    return DINOv3ViTModel(config).eval()


def _accelerated(network: nn.Module) -> nn.Module:
    from dinov3core.integrations.transformers import accelerate

    return accelerate(copy.deepcopy(network))


def _model(images: int, side: int, width: int, blocks: int) -> Case:
    """Pixels to the CLS token; the gradient reaches every parameter."""
    plain = _network(side, width, blocks)
    ours = _accelerated(plain)
    names = [name for name, _ in plain.named_parameters() if "mask_token" not in name]

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        for network in (plain, ours):
            network.to(device)
        state = {
            name: p.detach().to(device, dtype, copy=True) for name, p in plain.named_parameters()
        }
        pixels = torch.randn(images, 3, side, side, device=device, dtype=dtype)
        return state | {
            "pixels": pixels,
            "dout": torch.randn(images, width, device=device, dtype=dtype),
        }

    def run(network: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        state = {name: inputs[name] for name in (*names, "embeddings.mask_token")}
        return functional_call(network, state, (inputs["pixels"],)).pooler_output

    variants = {
        "ours": lambda inputs: run(ours, inputs),
        "plain": lambda inputs: run(plain, inputs),
    }
    tokens = 5 + (side // 16) ** 2
    weights = sum(p.numel() for p in plain.parameters())
    flops = images * (2.0 * weights * tokens + 4.0 * blocks * tokens**2 * width)
    shape = f"ViT {width} x {blocks}, {images} x {tokens} tokens"
    return Case(
        "transformers",
        shape,
        make,
        tuple(names),
        variants,
        (weights, 3.0 * weights),
        (flops, 3 * flops),
        False,
    )


def _layer(images: int, side: int, width: int, blocks: int) -> Case:
    """One attention layer with its projections."""
    plain = _network(side, width, 1)
    ours = _accelerated(plain)
    tokens = 5 + (side // 16) ** 2
    layers = [
        next(m for m in network.modules() if type(m).__name__.endswith("Attention"))
        for network in (plain, ours)
    ]
    names = [name for name, _ in layers[0].named_parameters()]

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        plain.to(device)
        cos, sin = plain.rope_embeddings(torch.empty(1, 3, side, side, device=device, dtype=dtype))
        state = {
            name: p.detach().to(device, dtype, copy=True)
            for name, p in layers[0].named_parameters()
        }
        x = torch.randn(images, tokens, width, device=device, dtype=dtype)
        return state | {
            "x": x,
            "cos": cos.to(dtype),
            "sin": sin.to(dtype),
            "dout": torch.randn_like(x),
        }

    def run(layer: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        state = {name: inputs[name] for name in names}
        tables = (inputs["cos"], inputs["sin"])
        return functional_call(layer, state, (inputs["x"],), {"position_embeddings": tables})[0]

    variants = {
        "ours": lambda inputs: run(layers[1], inputs),
        "plain": lambda inputs: run(layers[0], inputs),
    }
    elements = 2.0 * images * tokens * width + 4 * width**2
    flops = images * (8.0 * tokens * width**2 + 4 * tokens**2 * width)
    shape = f"attention {width}, {images} x {tokens} tokens"
    return Case(
        "transformers",
        shape,
        make,
        ("x", *names),
        variants,
        (elements, 3 * elements),
        (flops, 3 * flops),
        False,
    )
