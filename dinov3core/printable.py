"""Names of files as people may see them: on a terminal, on a page, in a JSON file."""


def printable(text: str) -> str:
    r"""`text` as one line that can be printed and encoded anywhere.

    A file name may hold any bytes but / and NUL: line breaks, terminal escapes, marks that turn the
    direction of writing, and bytes that are no UTF-8, which Python keeps as lone surrogates. What
    Unicode calls not printable is written as an escape: `\n`, `\x1b`, `\u202e`, and `\xff` for a
    byte that is no UTF-8. The rest stays as it is.
    """
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # what os.fsdecode makes of the byte code - 0xDC00
        return f"\\x{code - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode("ascii")
