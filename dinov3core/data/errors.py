"""What can be wrong with images: with one of them, or with all. Messages are printable."""

from dinov3core.printable import printable


class DataError(ValueError):
    """Images that cannot be used as a whole; says what was expected, what came, what to do."""

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
