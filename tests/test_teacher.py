"""When the Gram teacher takes the weights of the EMA teacher."""

from dinov3core.train.engine.teacher import GramUpdates


def updates(rule: GramUpdates, steps: int) -> list[int]:
    """The steps after which a run of so many is given an update."""
    due: list[int] = []
    for step in range(steps):
        if rule.due_after(step, len(due)):
            due.append(step)
    return due


def test_updates_fall_on_multiples_of_the_interval_from_the_first_on() -> None:
    rule = GramUpdates(from_snapshot=False, first=6, every=3, most=0)
    assert updates(rule, 15) == [5, 8, 11, 14]
    assert not any(rule.begins_before(step) for step in range(15))


def test_a_snapshot_is_taken_before_its_step_and_updated_from_the_next_multiple_on() -> None:
    rule = GramUpdates(from_snapshot=True, first=6, every=3, most=0)
    assert [step for step in range(15) if rule.begins_before(step)] == [6]
    assert updates(rule, 15) == [8, 11, 14]


def test_updates_end_with_the_last_one_allowed_and_an_interval_of_0_means_none() -> None:
    assert updates(GramUpdates(from_snapshot=False, first=6, every=3, most=2), 15) == [5, 8]
    assert updates(GramUpdates(from_snapshot=True, first=6, every=0, most=0), 15) == []
