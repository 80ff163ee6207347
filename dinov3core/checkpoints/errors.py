"""Whatever is wrong with a file of weights, in one printable line that begins with its path."""

import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from dinov3core.printable import printable

LONGEST = 900  # characters of a sentence; names inside a file may be of any length

# What readers of damaged files raise: json, zipfile, safetensors, torch.load, tensor arithmetic.
READ_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, ImportError,
    LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError,
    SafetensorError, pickle.PickleError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


class WeightsError(ValueError):
    """A file or folder of weights that cannot be used.

    Args:
        path: of the file or folder.
        sentence: what was expected, what came, what to do; it may quote the file.
    """

    def __init__(self, path: str | os.PathLike, sentence: str):
        super().__init__(f"{printable(os.fspath(path))}: {_shortened(printable(sentence))}")


@contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Inside, anything a reader raises becomes a WeightsError of `path`.

    A WeightsError passes as it is.
    """
    try:
        yield
    except WeightsError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise WeightsError(path, f"expected a readable file, got: {reason}") from error
    except READ_ERRORS as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise WeightsError(
            path,
            f"expected DINOv3 weights, got a damaged or foreign file ({reason}); download it again",
        ) from error


def _shortened(text: str) -> str:
    """Without the middle when it is long: what to do stands at the end."""
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST * 3 // 4]} ... {text[-LONGEST // 4 :]}"
