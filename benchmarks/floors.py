"""The guard: how much faster and smaller than the best of torch each op must stay, and what it is meant to reach.

floors.json holds, per machine class and case, `floor` and `memory_floor`: least ratios (rival's time or peak memory over
ours) against the best rival, set a margin under what was measured; and `goal`: ratios to reach against a named rival.
"""

import json
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Floors:
    """The entries of one machine class, by case."""

    entries: dict[str, dict]

    @classmethod
    def load(cls, machine_class: str) -> "Floors":
        """Entries for "cpu" or "cuda"; any other class has none."""
        return cls(json.loads((Path(__file__).parent / "floors.json").read_text()).get(machine_class, {}))

    def missed(self, record: dict) -> list[str]:
        """A sentence per floor the record is under."""
        entry, found = self.entries.get(record["case"], {}), []
        for key, ratio, what in (
            ("floor", best_ratio(record), "time"),
            ("memory_floor", memory_ratio(record), "peak memory"),
        ):
            if key in entry and ratio < entry[key]:
                found.append(
                    f"{record['case']}: the best rival's {what} is {ratio:.2f}x ours, the floor in "
                    f"benchmarks/floors.json is {entry[key]:.2f}x"
                )
        return found

    def check(self, record: dict) -> None:
        """Raise AssertionError naming every missed floor."""
        missed = self.missed(record)
        assert not missed, "; ".join(missed)

    def goals(self, record: dict) -> list[tuple[str, float, float]]:
        """(name, measured ratio, ratio to reach) of every goal of the record's case."""
        found = []
        for name, wanted in self.entries.get(record["case"], {}).get("goal", {}).items():
            rival, _, what = name.partition(" ")
            measured = memory_ratio(record, rival) if what == "memory" else record["ratio"].get(rival)
            if measured is not None:
                found.append((name, measured, wanted))
        return found


def best_ratio(record: dict) -> float:
    """Time of the fastest rival over ours."""
    return min(record["ratio"].values())


def memory_ratio(record: dict, rival: str | None = None) -> float:
    """Peak memory of a rival, by default the smallest one, over ours."""
    peaks = record["peak_bytes"]
    others = [value for name, value in peaks.items() if name != "ours"]
    wanted = min(others) if rival is None else peaks[rival]
    return wanted / max(peaks["ours"], 1)


def line(record: dict) -> str:
    """A record on one line of a terminal."""
    ratios = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in record["ratio"].items())
    memory = " / ".join(f"{name} {value / 1e6:.1f}" for name, value in record["peak_bytes"].items())
    return f"{record['case']:62s} {record['seconds']['ours'] * 1e3:9.3f} ms  {ratios:36s}  {memory}"
