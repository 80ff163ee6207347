"""Packaging. kernels/ and train/ are top-level folders on disk and dinov3core.kernels, dinov3core.train in Python."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="dinov3core",
    version="0.1.0",
    description="DINOv3 self-supervised vision pretraining: Triton kernels, compact models, one-command training",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["dinov3core", "dinov3core.*"]), "dinov3core.kernels", "dinov3core.train"],
    package_dir={"dinov3core.kernels": "kernels", "dinov3core.train": "train"},
    # Ranges are what was run: see constraints.txt for the exact set that CI tests.
    install_requires=["torch>=2.11", "numpy>=1.26"],
    extras_require={
        "train": [
            "matplotlib>=3.8",
            "pillow>=10.0",
            "safetensors>=0.4",
            "tqdm>=4.66",
            "tyro>=0.9",
        ],
        "tensorboard": ["tensorboard>=2.16"],
        "triton": ["triton>=3.6"],
        "xformers": ["xformers>=0.0.30"],
        "bench": ["pytest>=8", "pytest-benchmark>=5", "nvidia-ml-py>=12", "matplotlib>=3.8"],
        "dev": ["pytest>=8", "pytest-benchmark>=5", "ruff>=0.9", "triton>=3.6"],
    },
)
