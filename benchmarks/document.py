"""Write the results between the markers of docs/performance.md."""

import re

from benchmarks import report


def rewrite(text, results, charts):
    """Return the document with these results."""
    blocks = {
        "machine": _machine(results),
        "table": report.markdown(_lines(results, advice=False)),
        "advice": report.markdown(_lines(results, advice=True)),
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
    if earlier is None:
        return results
    measured = set(results["scenarios"])
    lines = [line for line in earlier["lines"] if line["scenario"] not in measured]
    return {
        **results,
        "lines": lines + results["lines"],
        "series": {**earlier["series"], **results["series"]},
        "scenarios": {**earlier["scenarios"], **results["scenarios"]},
    }


def _lines(results, advice):
    order = list(results["scenarios"])
    chosen = [line for line in results["lines"] if (line["scenario"] == "advice") == advice]
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
    for name, why in results["missing"].items():
        sentences.append(f"Not measured: {name} ({why}).")
    return " ".join(sentences)
