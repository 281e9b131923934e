"""Format the table for the terminal and for docs/performance.md."""

from rich.markup import escape
from rich.table import Table

HEADINGS = ("what", "measured", "against", "its result", "ratio [runs]", "goal", "met")


def rows(line):
    """Return the rows of a line: its own result, and one for each comparison."""
    first = [line["what"], figure(line["median"], line["unit"])]
    plain = [*first, "", "", "", goal(line["goal"], line["unit"]), met(line["met"])]
    table_rows = [plain] if line["goal"] or not line["comparisons"] else []
    for comparison in line["comparisons"]:
        ratios = comparison["ratios"]
        spread = f"{number(comparison['ratio'])} [{number(min(ratios))} to {number(max(ratios))}]"
        against = [comparison["against"], figure(comparison["median"], line["unit"]), spread]
        start = ["", ""] if table_rows else first
        end = [goal(comparison["goal"], "x"), met(comparison["met"])]
        table_rows.append([*start, *against, *end])
    return table_rows


def number(value):
    """Format a number with about three digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def figure(value, unit):
    """Format a number with its unit."""
    return f"{number(value)} {unit}"


def goal(value, unit):
    """Format the goal of a median."""
    if value is None:
        return ""
    sign = "≥" if value["at_least"] else "≤"
    return f"{sign} {value['bound']:,g} {'' if unit == 'x' else unit}".strip()


def met(value):
    """Format whether a goal is met."""
    return {None: "", True: "yes", False: "no"}[value]


def terminal_table(lines):
    """Return the table for the terminal."""
    table = Table(
        *map(escape, HEADINGS), title="medians; everything on this machine", show_lines=False
    )
    for line in lines:
        for row in rows(line):
            style = {"yes": "green", "no": "red"}.get(row[-1], "")
            table.add_row(*map(escape, row[:-1]), f"[{style}]{row[-1]}[/]" if style else row[-1])
    return table


def markdown(lines):
    """Return the table in Markdown."""
    text = [f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS)]
    text += [f"| {' | '.join(row)} |" for line in lines for row in rows(line)]
    return "\n".join(text)
