"""What the site has beyond its pages: the changelog, and tables made from the code."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import get_type_hints

import click
from mkdocs.structure.files import File

from flash_celery import errors, settings
from flash_celery.cli import flash
from flash_celery.monitoring.metrics import METRICS

ROOT = Path(__file__).parents[1]
#: A file that the tests write is shown with its name.
FILE = re.compile(r"<!-- file: (\S+) -->\n(```\w+)\n")
#: What the tests read, and readers need not see.
NOTE = re.compile(r"[ \t]*<!-- .*? -->\n?")


def on_files(files, config):
    """The changelog stands beside the code; a page of the site is made of it."""
    text = (ROOT / "CHANGELOG.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "changelog.md", content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Fill in what comes from the code, and take out the tests' own notes."""
    for name, make in TABLES.items():
        if f"<!-- code: {name} -->" in markdown:
            markdown = markdown.replace(f"<!-- code: {name} -->", make())
    return NOTE.sub("\n", FILE.sub(r'\2 title="\1"\n', markdown))


def settings_table():
    """Every setting, as `settings.py` declares it."""
    said = comments(inspect.getsource(settings.Settings))
    kinds = get_type_hints(settings.Settings)
    lines = []
    for field in dataclasses.fields(settings.Settings):
        if not field.name.startswith("flash_"):
            continue
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory()
        kind = getattr(kinds[field.name], "__name__", str(kinds[field.name]))
        django = f"CELERY_{field.name.upper()}"
        lines += [
            f"### `{field.name}`",
            said[field.name],
            f"*Type* `{kind}` · *default* `{default!r}` · *in Django* `{django}`",
        ]
    return "\n\n".join(lines)


def comments(source):
    """The `#:` comment above each attribute."""
    found, lines = {}, []
    for line in map(str.strip, source.splitlines()):
        if line.startswith("#:"):
            lines.append(line[2:].strip())
        elif lines:
            found[line.partition(":")[0]] = " ".join(lines)
            lines = []
    return found


def errors_table():
    """Every error, with what to do about it."""
    return "\n\n".join(_errors(errors.FlashError))


def _errors(kind):
    parent = kind.__mro__[1]
    yield f"### {kind.__name__}"
    yield inspect.getdoc(kind)
    if kind.solution:
        yield f"*What to do:* {kind.solution}"
    if parent is not Exception:
        tried = "Waiting can help: it is tried again." if kind.retry else "It is not tried again."
        yield f"{tried} A kind of [{parent.__name__}](#{parent.__name__.lower()})."
    for child in kind.__subclasses__():
        yield from _errors(child)


def commands_table():
    """Every command, as `--help` shows it."""
    return "\n\n".join(_commands(click.Context(flash, info_name="celery -A shop flash")))


def _commands(context):
    command = context.command
    _, _, name = context.command_path.partition("shop ")
    yield f"{'##' if context.parent is None else '###'} {name}"
    yield inspect.cleandoc(command.help)
    yield f"    {context.command_path} {' '.join(command.collect_usage_pieces(context))}"
    options = [one for one in command.params if isinstance(one, click.Option)]
    rows = [one.get_help_record(context) for one in options]
    if rows:
        shown = [f"| `{names}` | {said.replace('|', chr(92) + '|')} |" for names, said in rows]
        yield "\n".join(["| | |", "|---|---|", *shown])
    for each, inner in getattr(command, "commands", {}).items():
        yield from _commands(click.Context(inner, info_name=each, parent=context))


def metrics_table():
    """Every metric, as Prometheus is told of it."""
    head = "| metric | type | labels | meaning |\n|---|---|---|---|"
    rows = [
        f"| `{name}` | {kind} | {', '.join(f'`{label}`' for label in labels)} | {said} |"
        for name, (kind, said, labels) in METRICS.items()
    ]
    return "\n".join([head, *rows])


TABLES = {
    "settings": settings_table,
    "errors": errors_table,
    "commands": commands_table,
    "metrics": metrics_table,
}
