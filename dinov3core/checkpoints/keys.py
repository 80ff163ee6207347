"""Key tables: the one-to-one part of what two layouts call the same tensor."""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor


class KeyTable:
    """Names in the official layout beside those of another one.

    Each row is a pair of patterns in which `#` stands for an index and a final `*` for the rest of
    the name; both sides hold the same number of `#`, in the same order. The first row that fits
    decides.
    """

    def __init__(self, rows: Sequence[tuple[str, str]]):
        self._outward = [(_regex(official), foreign) for official, foreign in rows]
        self._inward = [(_regex(foreign), official) for official, foreign in rows]

    def to_official(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the other layout by official names; names in no row stay as they are."""
        return {_translate(key, self._inward) or key: value for key, value in tensors.items()}

    def from_official(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by the names of the other layout, without those that it has no name for."""
        named = {_translate(key, self._outward): value for key, value in tensors.items()}
        return {key: value for key, value in named.items() if key is not None}


def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)"))


def _translate(key: str, rows: Iterable[tuple[re.Pattern[str], str]]) -> str | None:
    for regex, target in rows:
        if match := regex.fullmatch(key):
            for part in match.groups():
                target = re.sub(r"[#*]", lambda _, part=part: part, target, count=1)
            return target
    return None


def summary(keys: Iterable[str], limit: int = 6) -> str:
    """Keys for a message: indices merged ("blocks.*.norm1.bias (12)"), at most `limit` kinds."""
    counts: dict[str, int] = {}
    for key in keys:
        kind = re.sub(r"\.\d+\.", ".*.", key)
        counts[kind] = counts.get(kind, 0) + 1
    shown = [kind if count == 1 else f"{kind} ({count})" for kind, count in counts.items()]
    more = f" and {len(shown) - limit} more kinds" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more
