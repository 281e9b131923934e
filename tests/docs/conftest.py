"""A page of the documents: its files and commands, and how to follow it in an empty folder."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from example_project.servers import wait_until
from tests.processes import LoggedProcess

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MARKED = r"<!-- {}: (\S+) -->\n(?:```\w*\n(.*?)```|((?:    .+\n|\n(?=    ))+))"


class Page:
    """What stands below `<!-- file: NAME -->` and `<!-- run: NAME -->`."""

    def __init__(self, name):
        self.text = (DOCS / name).read_text()
        self.files = self._marked("file")
        self.blocks = self._marked("run")

    def _marked(self, kind):
        blocks = re.findall(MARKED.format(kind), self.text, re.DOTALL)
        return {
            name: fenced or re.sub("^    ", "", text, flags=re.M) for name, fenced, text in blocks
        }

    def lines(self, name):
        """The commands of a block, one a line; a backslash joins two."""
        text = self.blocks[name].replace("\\\n", " ")
        return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]

    def statements(self, name):
        """The SQL of a block, statement by statement."""
        text = re.sub("--.*", "", self.blocks[name])
        return [statement.strip() for statement in text.split(";\n") if statement.strip()]

    def python(self):
        """Every example in Python, whether it is a file or not."""
        return re.findall(r"```python\n(.*?)```", self.text, re.DOTALL)


class Reader:
    """Follows a page: writes its files into a folder and runs its commands there."""

    def __init__(self, folder, **environment):
        self.folder = folder
        self.children = []
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
            **environment,
        }

    def write(self, page):
        for name, content in page.files.items():
            (self.folder / name).write_text(content)

    def start(self, command):
        """A command that stays; its output is in `child.log`."""
        child = LoggedProcess(
            shlex.split(command),
            self.folder / f"{len(self.children)}.log",
            cwd=self.folder,
            env=self.environment,
        )
        self.children.append(child)
        return child

    def run(self, command, timeout=120):
        """A command that ends."""
        return subprocess.run(
            shlex.split(command),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    @staticmethod
    def until_said(child, text, timeout=60.0):
        def said():
            log = child.log.read_text()
            assert child.poll() is None or text in log, f"ended with {child.returncode}: {log}"
            return text in log

        try:
            wait_until(said, f"{text!r} to be said", timeout)
        except TimeoutError:
            raise AssertionError(child.log.read_text()) from None

    def close(self):
        for child in self.children:
            if child.poll() is None:
                child.kill()
            child.wait(30)


@pytest.fixture
def reader(tmp_path):
    reader = Reader(tmp_path)
    yield reader
    reader.close()
