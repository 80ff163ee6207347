"""The fuzzing harness itself: it notices each thing that may go wrong, and repeats what it did."""

import mmap
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # import-mode=importlib does not add it

import numpy as np
import pytest
from fuzzing import campaign, damaged_file, mutated

SAMPLES = {"a.bin": bytes(range(256)) * 4, "b.bin": b"header" + bytes(100)}


def test_damage_repeats_and_differs_from_file_to_file():
    drawn = [damaged_file(SAMPLES, number, words=[b"word"]) for number in range(60)]
    assert drawn == [damaged_file(SAMPLES, number, words=[b"word"]) for number in range(60)]
    assert len({content for _, content in drawn}) > 50
    assert {name for name, _ in drawn} == set(SAMPLES)


def test_every_content_can_be_damaged():
    rng = np.random.default_rng(0)
    for content in (b"", b"x"):
        for _ in range(200):
            assert isinstance(mutated(content, rng, [b""], [b"word"]), bytes)


def test_what_is_accepted_and_refused_is_counted(tmp_path: Path):
    def read(path: Path) -> None:
        if not path.read_bytes().startswith(b"header"):
            raise ValueError("expected a header")

    outcome = campaign(SAMPLES, read, ValueError, tmp_path, files=40)
    assert outcome.accepted and outcome.refused and sum(outcome) >= 40
    assert not list(tmp_path.iterdir())


def traceback(path: Path) -> None:
    raise KeyError("lost")


def outside_the_contract(path: Path) -> None:
    assert path.name == "expected", "a value that nobody promised"


def hang(path: Path) -> None:
    while True:
        time.sleep(0.01)


def slow_extension(path: Path) -> None:
    """Like one, this catches what ends it."""
    try:
        hang(path)
    except BaseException:
        pass


def greedy(path: Path) -> None:
    """New pages from the system: what other tests gave back to numpy's heap would not count."""
    with mmap.mmap(-1, 40_000_000) as memory:
        np.frombuffer(memory, np.uint8)[:] += 1


def two_lines(path: Path) -> None:
    raise ValueError("one\ntwo")


@pytest.mark.parametrize(
    ("read", "message", "seconds"),
    [
        (traceback, "KeyError: 'lost' at ", 20),
        (outside_the_contract, "a value that nobody promised", 20),
        (hang, "still running after 0.1 s", 0.1),
        (slow_extension, "more than 0.1", 0.1),
        (greedy, "MB, more than 20", 20),
        (two_lines, "not one printable line", 20),
    ],
)
def test_every_failure_is_seen(tmp_path: Path, read, message: str, seconds: float):
    with pytest.raises(AssertionError, match=message):
        campaign(SAMPLES, read, ValueError, tmp_path, files=1, seconds=seconds, megabytes=20)


def test_checksums_are_mended_in_every_second_file(tmp_path: Path):
    seen = []

    def read(path: Path) -> None:
        seen.append(path.read_bytes())

    campaign(SAMPLES, read, ValueError, tmp_path, files=6, seal=lambda content: b"sealed")
    assert [content == b"sealed" for content in seen[:6]] == [False, True] * 3
