"""Packages that come with an extra of the installation, and the words for when they are missing.

Importing dinov3core and its ops needs torch alone; data, weights, training and commands need more.
"""

import importlib.util
import sys

EXTRA_OF = {  # by module, as setup.py has them by package
    "numpy": "train",
    "PIL": "train",
    "safetensors": "train",
    "tqdm": "train",
    "tyro": "train",
    "triton": "triton",
}
COMMAND = ("torch", "numpy", "PIL", "safetensors", "tqdm", "tyro")  # what every command imports


def missing(*modules: str) -> list[str]:
    """Those of some modules that cannot be imported."""
    return [module for module in modules if not _importable(module)]


def not_installed(modules: list[str]) -> ModuleNotFoundError:
    """The error to raise for modules that are missing; it names the command that installs them."""
    extra = ",".join(sorted({EXTRA_OF.get(module, "train") for module in modules}))
    sentence = (
        f"not installed: {', '.join(modules)}; install with: pip install 'dinov3core[{extra}]' "
        f"(in a checkout: pip install -e '.[{extra}]')"
    )
    return ModuleNotFoundError(sentence, name=modules[0])


def exit_without(*modules: str) -> None:
    """Leave the process with one sentence, where a command would end in a traceback."""
    if absent := missing(*modules):
        sys.exit(f"error: {not_installed(absent)}")


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
