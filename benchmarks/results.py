"""The results: lines of the table, each with the values of its runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median


@dataclass
class Goal:
    """A bound that a median should reach."""

    bound: float
    at_least: bool = True

    def met(self, value):
        """Return whether a value reaches the goal."""
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self):
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}"


@dataclass
class Comparison:
    """The same work done by another program, in the same runs."""

    against: str
    values: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    goal: Goal | None = None

    def add(self, value, ratio):
        """Add the result of a run."""
        self.values.append(value)
        self.ratios.append(ratio)


@dataclass
class Line:
    """One measured quantity."""

    scenario: str
    what: str
    unit: str
    values: list[float] = field(default_factory=list)
    goal: Goal | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    #: More about each run; `changes` and `checksum` are of the verified changes.
    details: list[dict] = field(default_factory=list)

    @property
    def median(self):
        """The median of the runs."""
        return median(self.values)

    def against(self, name, goal=None):
        """Add a comparison, and return it."""
        self.comparisons.append(Comparison(name, goal=goal))
        return self.comparisons[-1]

    def as_json(self):
        """Return all fields, with medians and whether goals are met."""
        result = asdict(self)
        result["median"] = self.median
        result["met"] = self.goal.met(self.median) if self.goal else None
        for comparison, fields in zip(self.comparisons, result["comparisons"], strict=True):
            fields["median"] = median(comparison.values)
            fields["ratio"] = median(comparison.ratios)
            fields["met"] = comparison.goal.met(fields["ratio"]) if comparison.goal else None
        return result
