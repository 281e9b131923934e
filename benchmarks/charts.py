"""Draw charts of the results, as PNG and SVG."""

from __future__ import annotations

import matplotlib as mpl

mpl.use("Agg")
mpl.rcParams.update(
    {
        "svg.hashsalt": "flash-celery",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "font.size": 9,
        "legend.frameon": False,
        "figure.dpi": 150,
    }
)

from matplotlib import pyplot as plt  # noqa: E402

#: The colours of flash-celery and of everything else.
OURS = "#2f6f4f"
OTHER = "#b8b8b8"
LOOP = "apply_async in a loop"


def draw(results, folder):
    """Draw the charts for which there are results; return their titles by name."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, (title, chart) in CHARTS.items():
        figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
        if chart(axes, results):
            axes.set_title(title)
            figure.savefig(folder / f"{name}.png")
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            drawn[name] = title
        plt.close(figure)
    return drawn


def throughput(axes, results):
    """Draw the throughput beside that of PostgreSQL's own client, which discards everything."""
    pairs = [
        (line, comparison)
        for line in results["lines"]
        for comparison in line["comparisons"]
        if comparison["against"] == "pg_recvlogical"
    ]
    for y, (line, comparison) in enumerate(pairs):
        _bar(axes, y + 0.2, comparison["values"], comparison["median"], OTHER, "pg_recvlogical")
        _bar(axes, y - 0.2, line["values"], line["median"], OURS, "flash replicate")
        ratio = f" {comparison['ratio']:.2f} of it"
        axes.text(line["median"], y - 0.2, ratio, va="center", fontsize=8)
    _name(axes, [line["what"] for line, _ in pairs])
    axes.set_xlabel("changes a second (medians; the lines are the runs' range)")
    return pairs


def alternatives(axes, results):
    """Draw the programs that enqueue one task for each change."""
    bars = [
        (comparison["against"], comparison["values"], comparison["median"], OTHER)
        for line in results["lines"]
        for comparison in line["comparisons"]
        if (line["scenario"] == "alternatives" and line["what"].endswith("a task for each"))
        or comparison["against"] == LOOP
    ]
    bars += [
        (f"flash replicate: {line['what']}", line["values"], line["median"], OURS)
        for line in results["lines"]
        if line["scenario"] == "single"
        or (line["scenario"] == "alternatives" and line["what"].endswith("a task for each"))
    ]
    for y, (_, values, middle, colour) in enumerate(bars):
        _bar(axes, y, values, middle, colour)
        axes.text(max(values), y, f"  {middle:,.0f}", va="center", fontsize=8)
    _name(axes, [name for name, *_ in bars])
    axes.set_xlabel("tasks enqueued a second")
    axes.margins(x=0.12)
    return bars


def latency(axes, results):
    """Draw the share of handlers that have started after a number of milliseconds."""
    samples = results["series"].get("latency", {})
    for (name, values), colour in zip(samples.items(), (OURS, OTHER), strict=False):
        # A change can reach its handler before COMMIT has returned to the writer.
        shown = [max(value, 0.1) for value in values]
        shares = [100 * (n + 1) / (len(values) + 1) for n in range(len(values))]
        axes.plot(shown, shares, color=colour, label=name, linewidth=2)
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds from the commit to the first line of the handler")
    axes.set_ylabel("% of the commits")
    axes.grid(alpha=0.3)
    if samples:
        axes.legend()
    return samples


def memory(axes, results):
    """Draw the resident memory over time."""
    series = results["series"].get("memory", {})
    for (name, samples), colour in zip(series.items(), (OURS, "#b5651d"), strict=False):
        axes.plot([s[0] for s in samples], [s[1] for s in samples], color=colour, label=name)
        for phase, label in (("drain", "▼ one drain"), ("large", "▼ the large transaction")):
            at, megabytes, _ = next(sample for sample in samples if sample[2] == phase)
            axes.annotate(
                label,
                (at, megabytes),
                xytext=(2, 22 if phase == "large" else 10),
                textcoords="offset points",
                color=colour,
                fontsize=7,
            )
    axes.set_ylim(bottom=0)
    axes.margins(y=0.2)
    axes.set_xlabel("seconds")
    axes.set_ylabel("resident MB")
    if series:
        axes.legend(loc="lower right")
    return series


def _bar(axes, y, values, middle, colour, label=None):
    labels = axes.get_legend_handles_labels()[1]
    axes.barh(y, middle, 0.38, color=colour, label=None if label in labels else label)
    axes.plot([min(values), max(values)], [y, y], color="black", linewidth=0.8)


def _name(axes, names):
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.15), ncols=2)


CHARTS = {
    "throughput": ("Draining a slot into a broker, against PostgreSQL's own client", throughput),
    "alternatives": ("One task for each change", alternatives),
    "latency": ("From the commit to the handler, 200 commits a second", latency),
    "memory": ("Resident memory of the replication worker", memory),
}
