"""Damaged copies of valid files, drawn from a seed, and what a reader may make of them.

A reader gets one damaged file after another. Either it returns, having checked what it read, or it
raises one of the errors it promises, whose message is one printable line. Anything else is a
failure of the campaign: another error, a value outside the contract (an AssertionError of the
reader), more time or more memory than allowed. File number n of a campaign depends on the seed and
on n alone, so that a failure is repeated by `damaged_file(samples, n)`.

    def read(path: Path) -> None:
        image = decode_rgb(str(path), path.name)
        assert image.mode == "RGB" and min(image.size) > 0

    outcome = campaign({"a.png": png}, read, UnreadableImage, tmp_path, files=30)
    assert outcome.refused

`DINOV3CORE_FUZZ` multiplies the number of files of every campaign.
"""

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

REPEAT = int(os.environ.get("DINOV3CORE_FUZZ", "1"))
MOST_MUTATIONS = 4
EXTREMES = (
    0,
    1,
    -1,
    127,
    128,
    255,
    2**15 - 1,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
)


class Outcome(NamedTuple):
    """How many files a reader took and how many it refused as promised."""

    accepted: int
    refused: int


class Hang(BaseException):
    """The time of one file is over; no reader catches this."""


def campaign(
    samples: Mapping[str, bytes],
    read: Callable[[Path], object],
    refusals: type[Exception] | tuple[type[Exception], ...],
    folder: Path,
    *,
    files: int,
    seed: int = 0,
    words: Sequence[bytes] = (),
    seal: Callable[[bytes], bytes] | None = None,
    seconds: float = 5.0,
    megabytes: int = 256,
) -> Outcome:
    """Let `read` open `files` * `DINOV3CORE_FUZZ` damaged files, one at a time, in `folder`.

    Args:
        samples: valid files by name; a damaged one keeps its name.
        read: opens a path and asserts that what it read is within its contract.
        refusals: what it may raise instead.
        words: bytes the format gives a meaning, which random damage would hardly meet.
        seal: mends the checksums of every second file, so that damage gets past them.
        seconds, megabytes: limits of one file, above what the process took before.

    Raises:
        AssertionError: names the files for which something else came, and what it was.
    """
    refused, failures = 0, []
    for number in range(files * REPEAT):
        name, content = damaged_file(samples, number, seed=seed, words=words)
        if seal is not None and number % 2:
            content = seal(content)
        path = folder / name
        path.write_bytes(content)
        try:
            with limited(seconds, megabytes):
                read(path)
        except refusals as error:
            refused += 1
            if not str(error).isprintable() or not str(error):
                failures.append(f"file {number} ({name}): not one printable line: {error!r}")
        except (Exception, Hang) as error:
            failures.append(f"file {number} ({name}): {_brief(error)}")
        path.unlink(missing_ok=True)
    report = "\n".join(failures[:10])
    assert not failures, f"{len(failures)} of {files * REPEAT} files, seed {seed}:\n{report}"
    return Outcome(files * REPEAT - refused, refused)


def damaged_file(
    samples: Mapping[str, bytes], number: int, *, seed: int = 0, words: Sequence[bytes] = ()
) -> tuple[str, bytes]:
    """Name and content of one file of a campaign, before its checksums are mended."""
    rng = np.random.default_rng((seed, number))
    names = sorted(samples)
    name = names[number % len(names)]
    others = [samples[other] for other in names]
    content = samples[name]
    for _ in range(rng.integers(1, MOST_MUTATIONS + 1)):
        content = mutated(content, rng, others, words)
    return name, content


def mutated(
    content: bytes,
    rng: np.random.Generator,
    others: Sequence[bytes] = (),
    words: Sequence[bytes] = (),
) -> bytes:
    """One mutation: a flipped bit, an extreme integer, a part cut, doubled, zeroed or replaced."""
    start, end = sorted(rng.integers(0, len(content) + 1, 2).tolist())
    end = min(end, start + int(2 ** rng.uniform(0, 12)))
    before, part, after = content[:start], content[start:end], content[end:]
    kinds = ["flip", "cut", "shorten", "double", "zero", "insert", "integer", "integer"]
    kinds += ["splice"] if others else []
    kinds += ["word", "word"] if words else []
    match kinds[rng.integers(len(kinds))]:
        case "flip":
            flipped = bytes(byte ^ 1 << int(rng.integers(8)) for byte in part[:1])
            return before + flipped + part[1:] + after
        case "cut":
            return before
        case "shorten":
            return before + after
        case "double":
            return before + part + part + after
        case "zero":
            return before + bytes(len(part)) + after
        case "insert":
            return before + rng.bytes(int(rng.integers(1, 16))) + part + after
        case "integer":
            number = _extreme_integer(rng)
            return before + number + content[start + len(number) :]
        case "splice":
            other = others[rng.integers(len(others))]
            return before + other[int(rng.integers(len(other) + 1)) :]
        case _:
            word = words[rng.integers(len(words))]
            return before + word + (after if rng.integers(2) else content[start + len(word) :])


@contextmanager
def limited(seconds: float, megabytes: int) -> Iterator[None]:
    """Raise `Hang` after `seconds`; AssertionError if the peak of memory rose by more.

    An extension that never returns to Python cannot be interrupted; its time is judged afterwards.
    """

    def stop(*_: object) -> None:
        raise Hang(f"still running after {seconds} s")

    handler = signal.signal(signal.SIGALRM, stop)
    hung = False
    before = _restart_peak()
    began = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Hang:
        hung = True
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        taken = time.monotonic() - began
        grown = (_kilobytes("VmHWM") - before) / 1024
        assert hung or taken <= seconds, f"took {taken:.1f} s, more than {seconds}"
        assert grown <= megabytes, f"took {grown:.0f} MB, more than {megabytes}"


def _extreme_integer(rng: np.random.Generator) -> bytes:
    size = int(2 ** rng.integers(4))
    value = EXTREMES[rng.integers(len(EXTREMES))] % 256**size
    return value.to_bytes(size, "little" if rng.integers(2) else "big")


def _restart_peak() -> int:
    """Memory of this process now, in kB; from here on its peak counts anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _kilobytes("VmRSS")


def _kilobytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise KeyError(field)


def _brief(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} at {place.filename}:{place.lineno}"
