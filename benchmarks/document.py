"""docs/performance.md: what stands between its markers comes from the results."""

import re

from benchmarks import report


def rewrite(text, results, charts):
    """The document with these results."""
    blocks = {
        "machine": _machine(results),
        "table": report.markdown(_lines(results, advice=False)),
        "advice": report.markdown(_lines(results, advice=True)),
        "charts": "\n\n".join(
            f"![{what}](performance/{name}.svg)" for name, what in charts.items()
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


def merged(kept, results):
    """Earlier results, with what was measured now in its place."""
    if kept is None:
        return results
    now = set(results["scenarios"])
    lines = [line for line in kept["lines"] if line["scenario"] not in now]
    return {
        **results,
        "lines": lines + results["lines"],
        "series": {**kept["series"], **results["series"]},
        "scenarios": {**kept["scenarios"], **results["scenarios"]},
    }


def _lines(results, advice):
    order = list(results["scenarios"])
    chosen = [line for line in results["lines"] if (line["scenario"] == "advice") == advice]
    return sorted(chosen, key=lambda line: order.index(line["scenario"]))


def _machine(results):
    verified = sum(
        detail.get("changes", 0) for line in results["lines"] for detail in line["details"]
    )
    told = "; ".join(f"{name} {value}" for name, value in results["machine"].items())
    sentences = [
        f"Measured {results['measured']} on this machine: {told}.",
        f"Medians of {results['runs']} runs; memory and what to set are of one run. "
        f"{verified:,} changes were verified.",
    ]
    if results["scale"] != 1:
        sentences.append(f"The sizes were scaled by {results['scale']:g}.")
    for name, why in results["missing"].items():
        sentences.append(f"Not measured: {name} ({why}).")
    return " ".join(sentences)
