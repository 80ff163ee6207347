"""What can be wrong with images: one of them, or all. The messages name files and are printable."""

from dinov3core.printable import printable


class DataError(ValueError):
    """Images that cannot be trained on as a whole; the message says what was expected and what was
    found.
    """

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
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return printable(f"{self.name}: {self.reason}")
