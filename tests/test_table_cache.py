"""The cache of rotation tables: computed once, again after a change, gone with its tensors."""

import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dinov3core.models.vit import VisionTransformer, VitSettings
from dinov3core.ops import rope_attention, rope_table, table_cache
from dinov3core.ops.table_cache import while_unchanged

Counted = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_cache, "_entries", type(table_cache._entries)())


@pytest.fixture
def calls() -> list[tuple[int, ...]]:
    return []


@pytest.fixture
def doubled(calls: list[tuple[int, ...]]) -> Iterator[Counted]:
    def compute(first: Tensor, *others: object) -> Tensor:
        calls.append(tuple(first.shape))
        return 2 * first

    yield compute


def test_computed_once_per_tensor_and_setting(doubled: Counted, calls: list) -> None:
    x, y = torch.ones(3), torch.ones(3)
    first = while_unchanged(doubled, (x,), 1)
    assert while_unchanged(doubled, (x,), 1) is first
    assert len(calls) == 1
    for tensors, setting in (((x,), 2), ((y,), 1), ((x, y), 1), ((y, x), 1)):
        assert while_unchanged(doubled, tensors, setting) is not first
    assert len(calls) == 5


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.add_(1),
        lambda x: x[0].fill_(7),
        lambda x: setattr(x, "data", torch.full((3,), 5.0)),
    ],
    ids=["in place", "a view in place", "data"],
)
def test_a_changed_tensor_is_computed_again(change: Callable, doubled: Counted) -> None:
    x = torch.ones(3)
    before = while_unchanged(doubled, (x,)).clone()
    change(x)
    after = while_unchanged(doubled, (x,))
    assert torch.equal(after, 2 * x) and not torch.equal(after, before)
    assert while_unchanged(doubled, (x,)) is after
    assert len(table_cache._entries) == 1


def test_an_entry_goes_with_the_first_of_its_tensors(doubled: Counted) -> None:
    x, y = torch.ones(3), torch.ones(3)
    value = weakref.ref(while_unchanged(doubled, (x, y)))
    del y
    assert not table_cache._entries and value() is None


def test_a_new_tensor_at_an_old_address_is_not_taken_for_it(doubled: Counted) -> None:
    for number in range(200):
        x = torch.full((4,), float(number))
        assert while_unchanged(doubled, (x,))[0] == 2 * number
        del x


def test_endless_sizes_do_not_fill_the_memory(doubled: Counted, calls: list) -> None:
    x = torch.ones(3)
    for size in range(3 * table_cache.LIMIT):
        while_unchanged(doubled, (x,), size)
    assert len(table_cache._entries) == table_cache.LIMIT
    while_unchanged(doubled, (x,), 3 * table_cache.LIMIT - 1)
    assert len(calls) == 3 * table_cache.LIMIT  # the newest are those that stay


def test_tensors_of_inference_mode_are_computed_every_time(doubled: Counted, calls: list) -> None:
    with torch.inference_mode():
        x = torch.ones(3)
    for _ in range(2):
        while_unchanged(doubled, (x,))
    assert len(calls) == 2 and not table_cache._entries


def test_what_inference_mode_computes_can_be_trained_with(doubled: Counted) -> None:
    x = torch.ones(3)
    with torch.inference_mode():
        value = while_unchanged(doubled, (x,))
    assert not value.is_inference()


def test_nothing_of_a_traced_call_stays(doubled: Counted) -> None:
    x = torch.ones(3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert type(while_unchanged(doubled, (x,))) is not Tensor
    with FlopCounterMode(display=False):
        while_unchanged(doubled, (x,))
    assert not table_cache._entries
    assert type(while_unchanged(doubled, (x,))) is Tensor


def test_threads_share_it(doubled: Counted) -> None:
    x, wrong = torch.arange(5.0), []

    def work(offset: int) -> None:
        for size in range(300):
            value = while_unchanged(doubled, (x,), (size + offset) % 100)
            if not torch.equal(value, 2 * x):
                wrong.append(size)

    threads = [threading.Thread(target=work, args=(17 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(table_cache._entries) <= table_cache.LIMIT


def test_a_model_and_its_attention_use_this_one() -> None:
    """Per grid one entry for the tables, which the model asks for, and one for their phases."""
    model = VisionTransformer(VitSettings(width=32, depth=3, heads=2, patch_size=4)).eval()
    for _ in range(2):
        model(torch.randn(1, 3, 8, 12))
    assert len(table_cache._entries) == 2
    del model
    assert not table_cache._entries


def test_a_model_that_was_evaluated_in_inference_mode_trains() -> None:
    model = VisionTransformer(VitSettings(width=32, depth=1, heads=2, patch_size=4))
    images = torch.randn(1, 3, 8, 8)
    with torch.inference_mode():
        model(images)
    model(images).sum().backward()
    assert model.cls_token.grad is not None


def test_tables_of_the_caller_keep_no_trace() -> None:
    sin, cos = rope_table(2, 2, 8)
    rope_attention(torch.randn(1, 4, 3, 2, 8), sin, cos)
    assert not vars(sin) and not vars(cos)
    assert len(table_cache._entries) == 1
    del sin
    assert not table_cache._entries
