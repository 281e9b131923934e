"""What the site takes from the code: tables, the picture of the packages, the changelog."""

import ast
import dataclasses
import html
import inspect
import re
import runpy
from pathlib import Path
from typing import get_type_hints

import click
from mkdocs.structure.files import File

from flash_celery import errors, settings
from flash_celery.cli import flash
from flash_celery.monitoring.metrics import METRICS

ROOT = Path(__file__).parents[1]
#: The name of a file that tests write. The site shows it above the block.
FILE = re.compile(r"<!-- file: (\S+) -->\n(```\w+)\n")
#: Comments for the tests.
NOTE = re.compile(r"[ \t]*<!-- .*? -->\n?")


def on_files(files, config):
    """Add CHANGELOG.md, which is outside of docs/, as a page."""
    text = (ROOT / "CHANGELOG.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "changelog.md", content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Replace each `<!-- code: … -->` by its part, and remove the comments for the tests."""
    for name, make in PARTS.items():
        if f"<!-- code: {name} -->" in markdown:
            markdown = markdown.replace(f"<!-- code: {name} -->", make())
    return NOTE.sub("\n", FILE.sub(r'\2 title="\1"\n', markdown))


def on_post_page(output, page, config):
    """Publish the Markdown of the page beside it: docs/llms.txt links to it."""
    markdown = Path(config.site_dir) / page.file.src_uri
    markdown.parent.mkdir(parents=True, exist_ok=True)
    markdown.write_text(page.markdown)
    return output


def settings_table():
    """Return every setting, as `settings.py` declares it."""
    comments = attribute_comments(inspect.getsource(settings.Settings))
    types = get_type_hints(settings.Settings)
    lines = []
    for field in dataclasses.fields(settings.Settings):
        if not field.name.startswith("flash_"):
            continue
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory()
        type_name = getattr(types[field.name], "__name__", str(types[field.name]))
        type_name = type_name.replace("collections.abc.", "")
        django = f"CELERY_{field.name.upper()}"
        lines += [
            f"### `{field.name}`",
            comments[field.name],
            f"*Type* `{type_name}` · *default* `{default!r}` · *in Django* `{django}`",
        ]
    return "\n\n".join(lines)


def attribute_comments(source):
    """Return the `#:` comment above each attribute."""
    comments, lines = {}, []
    for line in map(str.strip, source.splitlines()):
        if line.startswith("#:"):
            lines.append(line[2:].strip())
        elif lines:
            comments[line.partition(":")[0]] = " ".join(lines)
            lines = []
    return comments


def errors_table():
    """Return every error, with its solution."""
    return "\n\n".join(_errors(errors.FlashError))


def _errors(error_class):
    parent = error_class.__mro__[1]
    yield f"### {error_class.__name__}"
    yield inspect.getdoc(error_class)
    if error_class.solution:
        yield f"*What to do:* {error_class.solution}"
    if parent is not Exception:
        retried = "is" if error_class.retry else "is not"
        link = f"[{parent.__name__}](#{parent.__name__.lower()})"
        yield f"The operation {retried} retried. A subclass of {link}."
    for child in error_class.__subclasses__():
        yield from _errors(child)


def commands_table():
    """Return every command, as `--help` shows it."""
    return "\n\n".join(_commands(click.Context(flash, info_name="celery -A shop flash")))


def _commands(context):
    command = context.command
    _, _, name = context.command_path.partition("shop ")
    yield f"{'##' if context.parent is None else '###'} {name}"
    yield inspect.cleandoc(command.help)
    yield f"    {context.command_path} {' '.join(command.collect_usage_pieces(context))}"
    options = [param for param in command.params if isinstance(param, click.Option)]
    rows = [option.get_help_record(context) for option in options]
    if rows:
        lines = [f"| `{names}` | {text.replace('|', chr(92) + '|')} |" for names, text in rows]
        yield "\n".join(["| | |", "|---|---|", *lines])
    for child_name, child in getattr(command, "commands", {}).items():
        yield from _commands(click.Context(child, info_name=child_name, parent=context))


def metrics_table():
    """Return every metric, as Prometheus reads it."""
    head = "| metric | type | labels | meaning |\n|---|---|---|---|"
    rows = [
        f"| `{name}` | {kind} | {', '.join(f'`{label}`' for label in labels)} | {text} |"
        for name, (kind, text, labels) in METRICS.items()
    ]
    return "\n".join([head, *rows])


#: Pixels of the picture of the packages.
_WIDTH = 720
_ROW = 26
_COLUMN = 18
_CHARACTER = 7


def packages_picture():
    """Return an SVG of the packages in their order, with a dot for each import.

    The order is that of tests/unit/test_architecture.py, which holds the code to it. The name of a
    package is on the diagonal, so the dots of a row are below the names of what it imports.
    """
    architecture = runpy.run_path(str(ROOT / "tests" / "unit" / "test_architecture.py"))
    folder = architecture["PACKAGE"]
    packages = [name for name in architecture["ORDER"] if (folder / name).is_dir()]
    shapes = []
    for row, package in enumerate(packages):
        y = row * _ROW + _ROW / 2
        imports = {
            name
            for path in (folder / package).rglob("*.py")
            for name, _ in architecture["imported_packages"](path)
        }
        for column, name in enumerate(packages[:row]):
            x = column * _COLUMN + _COLUMN / 2
            if name in imports:
                title = f"<title>{package} imports {name}</title>"
                shapes.append(f'<circle cx="{x}" cy="{y}" r="4">{title}</circle>')
            else:
                shapes.append(f'<circle cx="{x}" cy="{y}" r="1" opacity="0.4"/>')
        text = ast.get_docstring(ast.parse((folder / package / "__init__.py").read_text()))
        sentence = " ".join(text.replace("`", "").split())
        sentence = re.split(r"[.;] ", sentence)[0].rstrip(".")
        room = _WIDTH - row * _COLUMN - (len(package) + 5) * _CHARACTER
        if len(sentence) * _CHARACTER > room:
            sentence = sentence.partition(": ")[0]
        shapes.append(
            f'<text x="{row * _COLUMN + 4}" y="{y + 4}"><tspan font-weight="bold">{package}'
            f'</tspan><tspan dx="10" opacity="0.7">{html.escape(sentence)}</tspan></text>'
        )
    return (
        f'<svg role="img" aria-label="The packages and what they import" fill="currentColor" '
        f'viewBox="0 0 {_WIDTH} {len(packages) * _ROW}" style="width: 100%; font-size: 14px">'
        f"{''.join(shapes)}</svg>"
    )


PARTS = {
    "settings": settings_table,
    "errors": errors_table,
    "commands": commands_table,
    "metrics": metrics_table,
    "packages": packages_picture,
}
