"""Ctrl-C and SIGTERM: training ends its step and saves; anything else is left at once."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

from dinov3core.train.engine.parallel import is_first

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A signal this soon after the first is an echo of it: Ctrl-C in a terminal reaches torchrun's
# processes from the terminal and, in some versions, once more from torchrun.
ECHO_SECONDS = 1.0


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; the message says what is saved.

    Args:
        number: of the signal.
        sentence: for the user.
        code: exit status; None: 128 + the signal, as shells count.
    """

    def __init__(self, number: int, sentence: str = "", code: int | None = None):
        super().__init__(sentence)
        self.number = number
        self.code = 128 + number if code is None else code


class StopSignals:
    """While entered, SIGINT and SIGTERM raise `Interrupted` or, within `deferred`, are noted.

    A second Ctrl-C raises in any case. Outside the main thread, where Python allows no handlers,
    nothing is installed and nothing is ever noted.
    """

    def __init__(self) -> None:
        self.received = 0
        self._received_at = 0.0
        self._deferring = False
        self._earlier: dict[int, Any] = {}  # handlers by signal

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}

    @contextlib.contextmanager
    def deferred(self, defer: bool = True) -> Iterator[None]:
        """Within, only note the first signal; `deferred(False)`, inside, lets it raise again."""
        before = self._deferring
        self._deferring = defer
        try:
            yield
        finally:
            self._deferring = before

    def asked(self) -> int:
        """The signal by which this process was asked to stop, 0: none."""
        return self.received

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received = number
            self._received_at = now
            if self._deferring and is_first():
                _say("\nstopping after this step; Ctrl-C once more leaves at once\n")
            if not self._deferring:
                raise Interrupted(number)
        elif number == signal.SIGINT and now - self._received_at > ECHO_SECONDS:
            raise Interrupted(number)


def _say(text: str) -> None:
    """Past sys.stderr: a signal may have come in the middle of a write to it."""
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, text.encode())
