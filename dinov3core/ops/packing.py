"""What attention has to know about packed sequences, as one value.

Shapes: T tokens of all sequences, laid one after the other; P patches of one image, d head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class PackedGroup(NamedTuple):
    """Equally long sequences, laid one after the other: one set of crops.

    Attributes:
        images: how many.
        length: tokens of each image, those of the prefix included.
        sin, cos: tables [P, d] of the tokens behind the prefix; both None: nothing is rotated.
    """

    images: int
    length: int
    sin: Tensor | None
    cos: Tensor | None


@dataclass(frozen=True)
class Packing:
    """How the T tokens of a call are cut into sequences, and how these are rotated.

    Built where a public function is entered and passed on whole. Only an operator schema, which
    holds tensors and numbers alone, has it in parts: `flat` in front of it, `from_flat` behind it.

    Attributes:
        groups: in the order of their tokens; either all of them have tables or none.
        prefix: leading tokens of every sequence that are not rotated.
        interleaved: angle k turns the channels (2 k, 2 k + 1), else (k, k + d / 2).
    """

    groups: tuple[PackedGroup, ...]
    prefix: int
    interleaved: bool

    @classmethod
    def from_flat(
        cls,
        sins: Sequence[Tensor],
        coss: Sequence[Tensor],
        counts: Sequence[int],
        lengths: Sequence[int],
        prefix: int,
        interleaved: bool,
    ) -> "Packing":
        """From operator arguments: what `flat` returned."""
        tables = zip(sins, coss, strict=True) if sins else [(None, None)] * len(counts)
        groups = (
            PackedGroup(images, length, sin, cos)
            for images, length, (sin, cos) in zip(counts, lengths, tables, strict=True)
        )
        return cls(tuple(groups), prefix, interleaved)

    def flat(self) -> dict[str, Any]:
        """As operator arguments, by name."""
        return {
            "sins": [group.sin for group in self.groups if group.sin is not None],
            "coss": [group.cos for group in self.groups if group.cos is not None],
            "counts": [group.images for group in self.groups],
            "lengths": [group.length for group in self.groups],
            "prefix": self.prefix,
            "interleaved": self.interleaved,
        }

    @property
    def tables(self) -> list[Tensor]:
        """sin and cos of every group in turn; empty where nothing is rotated."""
        pairs = ((group.sin, group.cos) for group in self.groups)
        return [table for pair in pairs for table in pair if table is not None]

    def with_tables(self, tables: Sequence[Tensor]) -> "Packing":
        """The same sequences with other tables, given as `tables` gives them."""
        if not tables:
            return self
        pairs = zip(tables[0::2], tables[1::2], strict=True)
        groups = (
            group._replace(sin=sin, cos=cos)
            for group, (sin, cos) in zip(self.groups, pairs, strict=True)
        )
        return replace(self, groups=tuple(groups))

    @property
    def table_dtype(self) -> torch.dtype | None:
        """The dtype of the tables, None where nothing is rotated."""
        sin = self.groups[0].sin
        return None if sin is None else sin.dtype

    def split(self, packed: Tensor) -> Sequence[Tensor]:
        """[T, ...] as one view [images * length, ...] per group."""
        if len(self.groups) == 1:
            return [packed]
        return packed.split_with_sizes([group.images * group.length for group in self.groups])

    def views(self, packed: Tensor) -> list[Tensor]:
        """[T, ...] as one view [images, length, ...] per group."""
        # view: unflatten takes 4 us longer, 3 % of a small call
        return [
            part.view(group.images, group.length, *packed.shape[1:])
            for group, part in zip(self.groups, self.split(packed), strict=True)
        ]

    def alone(self) -> "list[Packing]":
        """One packing per group."""
        return [replace(self, groups=(group,)) for group in self.groups]
