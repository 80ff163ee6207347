"""Packed sequences as one value, and back from the arguments of an operator."""

import dataclasses

import pytest
import torch

from dinov3core.ops.packing import PackedGroup, Packing


def packing(*, rotated: bool = True) -> Packing:
    """Two images of 3 + 4 tokens, then one of 3 + 2."""

    def table(rows: int) -> torch.Tensor | None:
        return torch.rand(rows, 8) if rotated else None

    groups = PackedGroup(2, 7, table(4), table(4)), PackedGroup(1, 5, table(2), table(2))
    return Packing(groups, prefix=3, interleaved=False)


@pytest.mark.parametrize("rotated", [True, False])
def test_operator_arguments_and_back(rotated: bool) -> None:
    whole = packing(rotated=rotated)
    again = Packing.from_flat(**whole.flat())
    assert (again.prefix, again.interleaved) == (whole.prefix, whole.interleaved)
    for group, other in zip(again.groups, whole.groups, strict=True):
        assert group[:2] == other[:2]
        assert group.sin is other.sin and group.cos is other.cos
    assert len(whole.tables) == (4 if rotated else 0)
    assert whole.table_dtype == (torch.float32 if rotated else None)


def test_views_share_the_memory_of_the_packed_tokens() -> None:
    packed = torch.arange(19 * 3).view(19, 3)
    first, second = packing().views(packed)
    assert first.shape == (2, 7, 3) and second.shape == (1, 5, 3)
    assert first.data_ptr() == packed.data_ptr() and torch.equal(second[0], packed[14:])
    for_rows = packing().views(torch.arange(38.0).view(2, 19).t())
    assert [x.shape for x in for_rows] == [(2, 7, 2), (1, 5, 2)]


def test_other_tables_in_the_same_order() -> None:
    whole = packing()
    copies = [table.clone() for table in whole.tables]
    other = whole.with_tables(copies)
    assert all(a is b for a, b in zip(other.tables, copies, strict=True))
    assert [group[:2] for group in other.groups] == [group[:2] for group in whole.groups]
    assert packing(rotated=False).with_tables([]).tables == []


def test_one_group_each() -> None:
    whole = packing()
    first, second = whole.alone()
    assert first.groups == whole.groups[:1] and second.groups == whole.groups[1:]
    assert first.prefix == whole.prefix


def test_it_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        packing().prefix = 0  # type: ignore[misc]
