"""The description on PyPI: README.md, without pictures and links that lead nowhere there."""

import re
from pathlib import Path

from setuptools import setup

README = (Path(__file__).parent / "README.md").read_text("utf-8")
BESIDE = r"\((?!https?:)[^)]+\)"  # a file of the repository
WITHOUT_PICTURES = re.sub(rf"^!\[[^]]*\]{BESIDE}\n+", "", README, flags=re.MULTILINE)
DESCRIPTION = re.sub(rf"\[([^]]+)\]{BESIDE}", r"\1", WITHOUT_PICTURES)

setup(
    long_description=f"{DESCRIPTION}\nThese pages are in `docs/` of the source distribution.\n",
    long_description_content_type="text/markdown",
)
