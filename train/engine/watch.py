"""A process that is at one thing for too long ends itself with a sentence."""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Iterator

PEER = "another process probably hangs or is dead"
LOOK = (
    "look at the last lines each process printed (torchrun --log-dir FOLDER --redirects 3) and at "
    "the machine of the one that printed nothing; the same command continues the run"
)


class Watch:
    """Ends this process with a sentence when it has been at one thing for too long.

    Args:
        seconds: what is too long; infinite: never.
        name: of this process, for the sentence.
    """

    def __init__(self, seconds: float = math.inf, name: str = "this process"):
        self.seconds = seconds
        self.name = name
        self.note("starting")

    def note(self, doing: str, suspect: str = PEER) -> None:
        """From now on this process is `doing` that; when it does not end, `suspect` is why."""
        self.doing = doing
        self._suspect = suspect
        self._since = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within, nothing takes too long."""
        doing = self.doing
        self._since = math.inf
        try:
            yield
        finally:
            self.note(doing)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Watch from a thread of its own, within."""
        if self.seconds == math.inf:
            yield
            return
        over = threading.Event()
        threading.Thread(target=self._look, args=(over,), name="watch", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _look(self, over: threading.Event) -> None:
        while not over.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._since > self.seconds:
                said = (
                    f"\nerror: {self.name} has been at one thing for {self.seconds / 60:g} minutes "
                    f"({self.doing}): {self._suspect}; {LOOK}; --run.timeout-minutes sets the limit"
                )
                print(said, file=sys.stderr, flush=True)
                os._exit(1)  # the main thread waits in a collective and can be reached no other way
