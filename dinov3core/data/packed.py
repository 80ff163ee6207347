"""Millions of strings without millions of objects."""

from collections.abc import Iterable, Sequence

import numpy as np


class PackedStrings(Sequence[str]):
    """Strings in two arrays, which forked worker processes share.

    Of a list they would each make a copy: reading an object counts up its references, which writes
    to its page of memory.
    """

    def __init__(self, strings: Iterable[str]):
        encoded = [text.encode("utf-8", "surrogateescape") for text in strings]
        self._ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        self._text = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return self._text[start : self._ends[index]].tobytes().decode("utf-8", "surrogateescape")
