"""The door to the Triton kernels: <repo>/kernels in a checkout, kernels/ beside it in a wheel."""

from pathlib import Path
from typing import Any

_inside = Path(__file__).with_suffix("")
_beside = Path(__file__).parents[1] / "kernels"
__path__ = [str(_inside if _inside.is_dir() else _beside)]


def __getattr__(name: str) -> Any:  # tells type checkers that rooms exist behind the door
    raise AttributeError(f"no kernel module {name!r} in {__path__[0]}")
