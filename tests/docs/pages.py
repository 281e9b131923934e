"""The pages of the documents as texts, and what stands in them."""

import re

import click

from .conftest import DOCS, ROOT

README = (ROOT / "README.md").read_text()
PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
EXTERNAL = re.compile(r"\]\((https?:[^)\s]*)\)")


def examples(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def commands(group, name=""):
    for each, command in group.commands.items():
        yield f"{name}{each}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{name}{each} ")
