"""How far a loop is: a bar where somebody watches, a line every ten seconds in a log or a pipe."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from tqdm import tqdm

EVERY = 10.0  # seconds between two lines of this process, whichever loops they are about


class Lines:
    """A stand-in for a tqdm bar that prints whole lines to stderr, for files and pipes.

    The ten seconds count across loops, so that many short ones in a row are not silent.

    Args:
        items: what is looped over; None: the caller reports with `update`.
        total: how many there are; None: their length, when they have one.
        desc, unit: what the loop does, and the singular of what it counts.
        initial: how many were done by an earlier process.
    """

    _last_line = 0.0  # of the process, by the monotonic clock
    _last_sign = 0.0  # of work in any loop

    def __init__(
        self,
        items: Iterable[Any] | None = None,
        *,
        total: int | None,
        desc: str,
        unit: str,
        initial: int = 0,
    ):
        self._items = items
        self._desc = desc
        self._unit = unit
        self._total = len(items) if total is None and isinstance(items, Sized) else total
        self._done = self._initial = initial
        self._details = ""
        self._said: int | None = None  # how many were done when this loop last spoke
        self._began = now = time.monotonic()
        if now - Lines._last_sign > EVERY:  # nothing was looping before: the silence begins here
            Lines._last_line = now
        Lines._last_sign = now

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self._items:
                yield item
                self.update()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """`count` more are done."""
        self._done += count
        now = Lines._last_sign = time.monotonic()
        if now - Lines._last_line >= EVERY:
            self._say(now)

    def set_postfix(self, refresh: bool = True, **values: object) -> None:
        """What the next line ends with; `refresh` is tqdm's and of no use here."""
        self._details = "".join(f", {name} {value}" for name, value in values.items())

    def close(self) -> None:
        """The end of a loop that has spoken is said as well."""
        if self._said not in (None, self._done) and self._done == self._total:
            self._say(time.monotonic())

    def _say(self, now: float) -> None:
        seconds = now - self._began
        done = self._done - self._initial  # by this process
        count = f"{self._done:,}" if self._total is None else f"{self._done:,} of {self._total:,}"
        text = f"{self._desc}: {count} {self._unit}s in {tqdm.format_interval(seconds)}"
        if self._total is not None and 0 < done < self._total - self._initial:
            text += f", {tqdm.format_interval(seconds / done * (self._total - self._done))} left"
        print(text + self._details, file=sys.stderr, flush=True)
        Lines._last_line = now
        self._said = self._done


def progress(
    items: Iterable[Any] | None = None,
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    leave: bool = False,
    delay: float = 0.0,
    shown: bool = True,
) -> "tqdm | Lines":
    """Loop over `items`, or call `update` on what this returns, and say on stderr how far it is.

    Args:
        desc, unit, total, initial: see `Lines`.
        leave: a finished bar stays on the terminal.
        delay: seconds before a bar appears, for loops that are mostly short.
        shown: False: silence, as for all but one of several processes.
    """
    if shown and not sys.stderr.isatty():
        return Lines(items, total=total, desc=desc, unit=unit, initial=initial)
    bar = {"leave": leave, "delay": delay, "dynamic_ncols": True, "disable": not shown}
    return tqdm(items, total=total, desc=desc, unit=unit, initial=initial, **bar)
