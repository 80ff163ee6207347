"""The guard: how much faster and smaller than the best of torch each op must stay.

floors.json holds, per machine class and case, `floor` and `memory_floor`: least ratios (time or
peak memory of the best rival over ours), set a margin under what was measured; and `goal`: ratios
to reach, by rival and quantity ("plain", "plain memory", "compiled backward"), or the share of the
roofline. Cases with `headline` stand in docs/ops.md.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results"


class Goal(NamedTuple):
    """A ratio that was measured beside the one to reach."""

    name: str
    measured: float
    wanted: float

    @property
    def met(self) -> bool:
        """Whether it is reached."""
        return self.measured >= self.wanted


@dataclass(frozen=True)
class Floors:
    """The entries of one machine class, by case."""

    entries: Mapping[str, dict]

    @classmethod
    def load(cls, machine_class: str) -> "Floors":
        """Entries for "cpu" or "gpu"; any other class has none."""
        classes = json.loads(Path(__file__).with_name("floors.json").read_text())
        return cls(classes.get(machine_class, {}))

    def missed(self, record: Mapping) -> list[str]:
        """A sentence per floor the record is under."""
        entry = self.entries.get(record["case"], {})
        sentences = []
        measured = {
            "floor": ("time", best_ratio(record)),
            "memory_floor": ("peak memory", memory_ratio(record)),
        }
        for key, (what, ratio) in measured.items():
            if key in entry and ratio < entry[key]:
                sentences.append(
                    f"{record['case']}: the best rival's {what} is {ratio:.2f}x ours, under the "
                    f"floor of {entry[key]:.2f}x in benchmarks/floors.json"
                )
        return sentences

    def goals(self, record: Mapping, records: Mapping[str, Mapping]) -> list[Goal]:
        """The goals of a record's case whose rival was measured.

        Args:
            records: all of them by case, as a goal may be about the difference of two.
        """
        goals = []
        for name, wanted in self.entries.get(record["case"], {}).get("goal", {}).items():
            rival, _, what = name.partition(" ")
            if rival == "roofline":
                goals.append(Goal(name, record["roofline"], wanted))
            elif rival not in record["seconds"]:
                continue
            elif what == "memory":
                goals.append(Goal(name, memory_ratio(record, rival), wanted))
            elif what == "backward":
                forward = records[record["case"].replace("forward+backward", "forward")]
                goals.append(Goal(name, _backward_ratio(record, forward, rival), wanted))
            else:
                goals.append(Goal(name, record["ratio"][rival], wanted))
        return goals


def best_ratio(record: Mapping) -> float:
    """Time of the fastest rival over ours."""
    return min(record["ratio"].values())


def memory_ratio(record: Mapping, rival: str | None = None) -> float:
    """Peak memory of a rival, by default the smallest one, over ours."""
    peaks = record["peak_bytes"]
    others = [value for name, value in peaks.items() if name != "ours"]
    return (min(others) if rival is None else peaks[rival]) / max(peaks["ours"], 1)


def _backward_ratio(both: Mapping, forward: Mapping, rival: str) -> float:
    """Backward time of a rival over ours, as differences of medians."""
    theirs, ours = (both["seconds"][name] - forward["seconds"][name] for name in (rival, "ours"))
    return theirs / ours


def lines(records: Sequence[Mapping]) -> list[str]:
    """Aligned lines of a terminal: the rivals' times and least peak memory over ours, our time."""
    ratios = [_ratios(record) for record in records]
    case_width = max(len(record["case"]) for record in records)
    ratio_width = max(len(text) for text in ratios)
    return [
        f"{record['case']:{case_width}}   {text:{ratio_width}}    "
        f"memory {memory_ratio(record):.2f}x   {record['seconds']['ours'] * 1e3:8.3f} ms"
        for record, text in zip(records, ratios, strict=True)
    ]


def _ratios(record: Mapping) -> str:
    return "  ".join(f"{name} {ratio:.2f}x" for name, ratio in record["ratio"].items())
