"""Which processes train which students, so that nobody waits: an exact search.

A step has two phases. First every process runs the teacher on its share of the images, and waits
for the one with the largest share. Then every student trains on the images of its processes, and
all wait for the slowest. With t and s seconds per image of teacher and students, B images and n of
N processes for a student, a step takes

    t * ceil(B / N) + max over ranges of (B / n * sum of its students' s)

and n divides B. Exchanges and the fixed cost of a step are left out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dinov3core.train.engine.config import ConfigError
from dinov3core.train.engine.distillation.settings import Ranks


class Costs(NamedTuple):
    """What an image costs, in seconds or any other unit."""

    teacher: float  # its forward pass
    students: Mapping[str, float]  # a training step, by name


class Place(NamedTuple):
    """Students that the same processes train, one after the other."""

    students: tuple[str, ...]
    ranks: Ranks

    @property
    def processes(self) -> int:
        first, past = self.ranks
        return past - first


@dataclass(frozen=True)
class Layout:
    """Students and the processes that train them.

    Args:
        places: they cover the processes from 0 on, without gaps.
        images: of a step.
    """

    places: tuple[Place, ...]
    images: int

    @property
    def processes(self) -> int:
        """N, of all places."""
        return sum(place.processes for place in self.places)

    def teacher_cost(self, costs: Costs) -> float:
        """Of the process with the largest share of images."""
        return costs.teacher * math.ceil(self.images / self.processes)

    def cost(self, place: Place, costs: Costs) -> float:
        """Of the students of a place in a step, for each of its processes."""
        each = sum(costs.students[name] for name in place.students)
        return each * self.images / place.processes

    def step_cost(self, costs: Costs) -> float:
        """Of a step, from its beginning to the last process's end."""
        return self.teacher_cost(costs) + max(self.cost(place, costs) for place in self.places)

    def idle_share(self, costs: Costs) -> float:
        """Share of all processes' time in a step in which they wait for others."""
        busy = self.images * (costs.teacher + sum(costs.students.values()))
        return 1 - busy / (self.processes * self.step_cost(costs))


def shared_by_all(names: Sequence[str], images: int, processes: int) -> Layout:
    """The layout in which all processes train all students."""
    return Layout((Place(tuple(names), (0, processes)),), images)


def proposed(costs: Costs, images: int, processes: int) -> Layout:
    """Processes for each student of its own, as long as that can be, with the shortest step.

    Where there are fewer processes than students, or where their numbers cannot be divisors of the
    images otherwise, as few students as possible share processes. Of what can be, the shortest step
    is taken, exactly.

    Raises:
        ConfigError: these images cannot be divided among so many processes at all.
    """
    names = tuple(costs.students)
    divisors = [n for n in range(1, min(images, processes) + 1) if images % n == 0]
    weights = [costs.students[name] for name in names]
    for ranges in range(min(len(names), processes), 0, -1):
        groups = _divided(weights, divisors, processes, ranges)
        if groups:
            break
    else:
        raise ConfigError(
            f"{images} images a step cannot be divided among {processes} processes: expected "
            f"numbers of processes that divide {images} and add up to {processes} for at most "
            f"{len(names)} students; {_next_lower(len(names), divisors, processes)} can"
        )
    places = []
    first = 0
    for members, count in sorted(groups):
        places.append(Place(tuple(names[one] for one in members), (first, first + count)))
        first += count
    return Layout(tuple(places), images)


def _divided(
    weights: Sequence[float], divisors: Sequence[int], processes: int, ranges: int
) -> list[tuple[list[int], int]]:
    """Students in so many groups with a number of processes each, the slowest as fast as can be.

    By dynamic programming over (groups, students in them, processes in all).

    Returns:
        (members, processes) of each group; empty when it cannot be.
    """
    everyone = (1 << len(weights)) - 1
    start = np.full(processes + 1, np.inf)
    start[0] = 0.0
    reached: list[dict[int, np.ndarray]] = [{0: start}]
    choices: list[dict[int, np.ndarray]] = [{}]  # (group, its processes) of the best, by processes
    for _ in range(ranges):
        slowest: dict[int, np.ndarray] = {}
        chosen: dict[int, np.ndarray] = {}
        for before, costs in reached[-1].items():
            for group in _groups_with_the_first_of(everyone & ~before):
                weight = sum(weights[one] for one in _members(group))
                mask = before | group
                best = slowest.setdefault(mask, np.full(processes + 1, np.inf))
                how_many = chosen.setdefault(mask, np.zeros((processes + 1, 2), np.int64))
                for count in divisors:
                    costs_now = np.maximum(costs[: processes + 1 - count], weight / count)
                    better = np.flatnonzero(costs_now < best[count:])
                    best[count + better] = costs_now[better]
                    how_many[count + better] = group, count
        reached.append(slowest)
        choices.append(chosen)

    if everyone not in reached[-1] or math.isinf(reached[-1][everyone][processes]):
        return []
    groups = []
    mask, left = everyone, processes
    for chosen in reversed(choices[1:]):
        group, count = map(int, chosen[mask][left])
        groups.append((_members(group), count))
        mask &= ~group
        left -= count
    return groups


def _groups_with_the_first_of(mask: int) -> list[int]:
    """All sets of students of a mask that have its first one, small ones first.

    That one has to be in some group, so that no division is looked at twice.
    """
    first = mask & -mask
    rest = mask & ~first
    groups = []
    others = rest
    while mask:
        groups.append(first | others)
        if not others:
            break
        others = (others - 1) & rest
    return sorted(groups, key=lambda group: (group.bit_count(), group))


def _members(mask: int) -> list[int]:
    """Numbers of the bits of a mask."""
    return [one for one in range(mask.bit_length()) if mask >> one & 1]


def _next_lower(students: int, divisors: Sequence[int], processes: int) -> int:
    """The most processes below so many that a few divisors add up to."""
    sums = {0}
    for _ in range(students):
        sums |= {one + divisor for one in sums for divisor in divisors}
    return max(one for one in sums if one < processes)
