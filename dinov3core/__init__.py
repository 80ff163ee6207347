"""dinov3core: DINOv3 self-supervised pretraining with its own kernels, models, losses, data and evaluations."""

__version__ = "0.1.0"
