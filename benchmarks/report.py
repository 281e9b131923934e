"""The table, as it is printed and as docs/performance.md has it."""

from rich.markup import escape
from rich.table import Table

HEADINGS = ("what", "measured", "against", "which gives", "ratio [runs]", "goal", "met")


def rows(line):
    """The rows of one line: what it measured, and one for each comparison."""
    first = [line["what"], figure(line["median"], line["unit"])]
    plain = [*first, "", "", "", goal(line["goal"], line["unit"]), met(line["met"])]
    found = [plain] if line["goal"] or not line["comparisons"] else []
    for one in line["comparisons"]:
        spread = (
            f"{number(one['ratio'])} [{number(min(one['ratios']))} to {number(max(one['ratios']))}]"
        )
        against = [one["against"], figure(one["median"], line["unit"]), spread]
        start = ["", ""] if found else first
        found.append([*start, *against, goal(one["goal"], "x"), met(one["met"])])
    return found


def number(value):
    """Three digits or so."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def figure(value, unit):
    """A number with its unit."""
    return f"{number(value)} {unit}"


def goal(kept, unit):
    """What a median should reach."""
    if kept is None:
        return ""
    sign = "≥" if kept["at_least"] else "≤"
    return f"{sign} {kept['bound']:,g} {'' if unit == 'x' else unit}".strip()


def met(kept):
    """Whether it does."""
    return {None: "", True: "yes", False: "no"}[kept]


def table(lines):
    """For the terminal."""
    shown = Table(
        *map(escape, HEADINGS), title="medians; everything on this machine", show_lines=False
    )
    for line in lines:
        for row in rows(line):
            style = {"yes": "green", "no": "red"}.get(row[-1], "")
            shown.add_row(*map(escape, row[:-1]), f"[{style}]{row[-1]}[/]" if style else row[-1])
    return shown


def markdown(lines):
    """For the document."""
    text = [f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS)]
    text += [f"| {' | '.join(row)} |" for line in lines for row in rows(line)]
    return "\n".join(text)
