"""What can be wrong with images: one of them, or all."""


class DataError(ValueError):
    """Images that cannot be trained on as a whole; the message says what was expected and what was found."""

    def __str__(self) -> str:
        return printable(super().__str__())


class UnreadableImage(Exception):
    """One image cannot be used; training goes on without it.

    Attributes:
        name: which one.
        reason: why.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return printable(f"{self.name}: {self.reason}")


def printable(text: str) -> str:
    r"""One line: the control characters that names of files may hold become \n, \x1b, \udcff."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
