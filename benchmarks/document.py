"""Write the results between the markers of docs/performance.md."""

import re

from benchmarks import report

#: The scenarios that have a table of their own.
OWN_TABLES = ("ordered", "advice")


def rewrite(text, results, charts):
    """Return the document with these results."""
    blocks = {
        "machine": _machine(results),
        "table": report.markdown(_lines(results)),
        **{name: report.markdown(_lines(results, name)) for name in OWN_TABLES},
        "charts": "\n\n".join(
            f"![{title}](performance/{name}.svg)" for name, title in charts.items()
        ),
    }
    for name, block in blocks.items():
        text, found = re.subn(
            rf"(<!-- bench:{name} -->\n).*?(<!-- /bench:{name} -->)",
            lambda match, block=block: f"{match[1]}{block}\n{match[2]}",
            text,
            flags=re.DOTALL,
        )
        if not found:
            raise ValueError(f"docs/performance.md has no block bench:{name}")
    return text


def merged(earlier, results):
    """Return earlier results, with those of now in their place."""
    measured = set(results["scenarios"])
    if earlier is None or measured >= set(earlier["scenarios"]):
        return results
    lines = [line for line in earlier["lines"] if line["scenario"] not in measured]
    facts = {name: results[name] for name in ("measured", "runs", "scale")}
    return {
        **earlier,
        "lines": lines + results["lines"],
        "series": {**earlier["series"], **results["series"]},
        "scenarios": {**earlier["scenarios"], **results["scenarios"]},
        "missing": {**earlier["missing"], **results["missing"]},
        "apart": {**earlier.get("apart", {}), **dict.fromkeys(measured, facts)},
    }


def _lines(results, table=None):
    """Return the lines of a table: that of one scenario, or of all that have none of their own."""
    order = list(results["scenarios"])
    chosen = [
        line
        for line in results["lines"]
        if (line["scenario"] if line["scenario"] in OWN_TABLES else None) == table
    ]
    return sorted(chosen, key=lambda line: order.index(line["scenario"]))


def _machine(results):
    verified = sum(
        detail.get("changes", 0) for line in results["lines"] for detail in line["details"]
    )
    machine = "; ".join(f"{name} {value}" for name, value in results["machine"].items())
    sentences = [
        f"Measured {results['measured']} on this machine: {machine}.",
        f"Medians of {results['runs']} runs; memory and the advice on settings are from one run. "
        f"{verified:,} changes were verified.",
    ]
    if results["scale"] != 1:
        sentences.append(f"The sizes were scaled by {results['scale']:g}.")
    for name, facts in results.get("apart", {}).items():
        sentences.append(
            f"Measured apart, on {facts['measured']}: {name} "
            f"({facts['runs']} runs, sizes scaled by {facts['scale']:g})."
        )
    for name, why in results["missing"].items():
        sentences.append(f"Not measured: {name} ({why}).")
    return " ".join(sentences)
