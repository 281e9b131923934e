"""What was measured: lines of the table, each a list of runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median


@dataclass
class Goal:
    """What a median should reach."""

    bound: float
    at_least: bool = True

    def met(self, value):
        """Whether a value reaches it."""
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self):
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}"


@dataclass
class Comparison:
    """The same thing done by something else, in the same runs."""

    against: str
    values: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    goal: Goal | None = None

    def add(self, value, ratio):
        """One run."""
        self.values.append(value)
        self.ratios.append(ratio)


@dataclass
class Line:
    """One thing that was measured."""

    scenario: str
    what: str
    unit: str
    values: list[float] = field(default_factory=list)
    goal: Goal | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    #: Per run, whatever else is worth keeping; `changes` and `checksum` are what was verified.
    details: list[dict] = field(default_factory=list)

    @property
    def median(self):
        """The median of the runs."""
        return median(self.values)

    def against(self, name, goal=None):
        """A new comparison."""
        self.comparisons.append(Comparison(name, goal=goal))
        return self.comparisons[-1]

    def as_json(self):
        """Everything, with medians and whether goals are met."""
        found = asdict(self)
        found["median"] = self.median
        found["met"] = self.goal.met(self.median) if self.goal else None
        for comparison, kept in zip(self.comparisons, found["comparisons"], strict=True):
            kept["median"] = median(comparison.values)
            kept["ratio"] = median(comparison.ratios)
            kept["met"] = comparison.goal.met(kept["ratio"]) if comparison.goal else None
        return found
