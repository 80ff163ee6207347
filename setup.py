"""Packaging: the folders kernels/ and train/ are dinov3core.kernels and dinov3core.train."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="dinov3core",
    version="0.1.0",
    description="DINOv3 self-supervised vision pretraining: kernels, models, one-command training",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["dinov3core", "dinov3core.*"]),
        "dinov3core.kernels",
        "dinov3core.train",
        "dinov3core.train.engine",
        "dinov3core.train.engine.distillation",
        "dinov3core.train.recipes",
    ],
    package_dir={"dinov3core.kernels": "kernels", "dinov3core.train": "train"},
    entry_points={"console_scripts": ["dinov3core = dinov3core.__main__:main"]},
    keywords=["self-supervised learning", "vision transformer", "DINOv3", "Triton"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    # Lower bounds are the oldest versions the tests were run with; constraints.txt has the exact
    # set. The interpreter of triton 3.6, which only tests use, needs numpy < 2.4.
    install_requires=["torch>=2.11"],  # all that ops, models and losses import
    extras_require={
        "train": ["numpy>=2.0", "pillow>=11.0", "safetensors>=0.5", "tqdm>=4.66", "tyro>=1.0"],
        "export": ["onnx>=1.19", "onnxscript>=0.7", "onnxruntime>=1.22"],
        "eval": ["scikit-learn>=1.6"],  # for the task logreg of train/evaluate.py alone
        "tensorboard": ["tensorboard>=2.21"],
        "triton": ["triton>=3.6"],
        "xformers": ["xformers"],  # not run: no build for a machine without a GPU
        "bench": ["pytest>=9.2", "pytest-benchmark>=5.3", "nvidia-ml-py>=13", "matplotlib>=3.11"],
        "docs": ["sphinx>=9.0", "myst-parser>=5.2", "furo>=2025.12", "griffelib>=2.4"],
        "dev": [
            "pytest>=9.2",
            "pytest-benchmark>=5.3",
            "matplotlib>=3.11",
            "mypy>=2.4",
            "ruff>=0.17",
            "griffelib>=2.4",
            "scikit-learn>=1.9",
            "triton>=3.6",
        ],
    },
)
