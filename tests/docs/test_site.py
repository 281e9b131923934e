"""The site is whole: every page and anchor is there, everything public is in it, nothing is loaded
from elsewhere, and every example is run by a test."""

import html
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import click
import pytest
import yaml
from markdown.extensions.toc import slugify

import flash_celery
from flash_celery import errors
from flash_celery.cli import flash
from flash_celery.monitoring.metrics import METRICS
from flash_celery.settings import Settings
from tests.docs.pages import EXTERNAL, PAGES, README, commands, examples
from tests.unit.test_architecture import ORDER, PACKAGE

from .conftest import DOCS, ROOT

TESTS = "".join(path.read_text() for path in sorted((ROOT / "tests").rglob("test_*.py")))
TAG = re.compile("<[^>]*>")
LLMS = (DOCS / "llms.txt").read_text()


def build(folder, docs=DOCS):
    configuration = (ROOT / "mkdocs.yml").read_text()
    target = folder / "mkdocs.yml"
    configuration = configuration.replace("docs_dir: docs", f"docs_dir: {docs}")
    configuration = configuration.replace("site_dir: build/site", f"site_dir: {folder / 'site'}")
    configuration = configuration.replace("- docs/hooks.py", f"- {DOCS / 'hooks.py'}")
    target.write_text(configuration.replace("paths: [.]", f"paths: [{ROOT}]"))
    # Not --quiet: then --strict counts no warning.
    return subprocess.run(
        [Path(sys.executable).with_name("mkdocs"), "build", "--strict", "-f", target],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    built = build(folder)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "site"


@pytest.mark.soak  # `make docs` builds the site
def test_reference_lists_everything_public(site):
    python = (site / "reference" / "python.html").read_text()
    for name in flash_celery.__all__:
        assert name == "FlashError" or f'id="flash_celery.{name}"' in python, name
    settings = (site / "reference" / "settings.html").read_text()
    for name in Settings.__dataclass_fields__:
        assert not name.startswith("flash_") or f'id="{name}"' in settings, name
    shown = (site / "reference" / "commands.html").read_text()
    for name, command in commands(flash):
        assert f"flash {name}" in shown
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.opts[0] in shown, parameter.name
    kinds = (site / "reference" / "errors.html").read_text()
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.FlashError):
            assert f'id="{name.lower()}"' in kinds, name
    counted = (site / "reference" / "metrics.html").read_text()
    for name, metric in METRICS.items():
        assert name in counted, name
        # Text in `backticks` is <code> there.
        assert metric.help.replace("`", "") in html.unescape(TAG.sub("", counted)), name
        assert all(f"<code>{label}</code>" in counted for label in metric.labels), name


@pytest.mark.soak  # `make docs` builds the site
def test_site_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert "<!-- run:" not in text, page
        assert "<!-- code:" not in text, page
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*?\ssrc=\"?([^\s\">]+)", text)
        for tag in re.findall(r"<link\b[^>]*>", text):
            if "canonical" not in tag:
                loaded += re.findall(r"href=\"?([^\s\">]+)", tag)
        assert not [address for address in loaded if re.match(r"(?:https?:)?//", address)], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", style.read_text()), style


@pytest.mark.soak  # it builds the site once more
@pytest.mark.parametrize("link", ["tutorial.md#nowhere", "nowhere.md", "/tutorial.md"])
def test_site_build_fails_on_a_broken_link(tmp_path, link):
    shutil.copytree(DOCS, tmp_path / "docs")
    page = tmp_path / "docs" / "index.md"
    page.write_text(f"{page.read_text()}\n[broken]({link})\n")
    built = build(tmp_path, tmp_path / "docs")
    assert built.returncode != 0
    assert link.split("#")[-1] in built.stdout + built.stderr


@pytest.mark.soak  # `make docs` builds the site
def test_site_has_llms_txt_and_the_pages_that_it_links(site):
    text = (site / "llms.txt").read_text()
    assert text == LLMS
    for target in re.findall(r"\]\(([^)]*)\)", text):
        assert (site / target).stat().st_size > 500, target
        assert "<!--" not in (site / target).read_text(), target


def test_llms_txt_has_the_form_of_llmstxt_org():
    """A title, a summary in one sentence, text without headings, and lists of links."""
    title, summary, *_ = LLMS.split("\n\n")
    assert title == "# flash-celery"
    assert re.fullmatch(r"> [^\n]*\.", summary)
    assert ". " not in summary
    introduction, *sections = re.split(r"^## ", LLMS, flags=re.MULTILINE)
    assert len(re.findall(r"^#+ ", introduction, re.MULTILINE)) == 1
    for section in sections:
        heading, _, links = section.partition("\n\n")
        assert "\n" not in heading
        for line in links.strip().splitlines():
            assert re.fullmatch(r"- \[.+\]\(.+\): .+\.", line), line


def test_llms_txt_links_every_page():
    linked = re.findall(r"\]\(([^)]*)\)", LLMS)
    assert len(linked) == len(set(linked))
    assert sorted(linked) == sorted(set(PAGES) - {"index.md"})


def test_llms_txt_shows_the_handler_of_the_readme():
    (example,) = examples(LLMS)
    assert example in README.replace("# shop.py\n", "")


def test_llms_txt_names_the_versions_of_the_readme():
    versions = re.findall(r"\d[\d.]* to \d[\d.]*\d", README.partition("## Supported")[2])
    assert versions
    for version in versions:
        assert version in LLMS, version


def test_picture_of_the_packages_shows_each_package_and_its_imports():
    picture = runpy.run_path(str(DOCS / "hooks.py"))["packages_picture"]()
    for name in ORDER:
        assert (f">{name}</tspan>" in picture) == (PACKAGE / name).is_dir(), name
    assert "worker imports capture<" in picture
    assert "capture imports worker<" not in picture


def test_pages_are_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    (nav,) = [part for part in re.split(r"\n(?=\w)", text) if part.startswith("nav:")]
    listed = re.findall(r": (\S+\.md)$", nav, re.MULTILINE)
    assert sorted({*listed} - {"changelog.md"}) == sorted(PAGES)
    assert isinstance(yaml.safe_load(nav)["nav"], list)


def test_anchors_exist():
    """In the README too, which `mkdocs build` does not read."""
    read = {DOCS / name: text for name, text in PAGES.items()} | {ROOT / "README.md": README}
    anchors = {page: anchors_of(text) for page, text in read.items()}
    checked = 0
    for page, text in read.items():
        for target, anchor in re.findall(r"\]\(([^):]*)#([^)]+)\)", text):
            path = (page.parent / target).resolve() if target else page
            if path in anchors and "reference" not in path.parts:  # those are made from the code
                assert anchor in anchors[path], (page, target, anchor)
                checked += 1
    assert checked > 50


def test_anchors_of_the_old_reliability_page_exist():
    """Pages elsewhere may link to what has a page of its own now."""
    anchors = anchors_of(PAGES["reliability.md"])
    for anchor in (
        "what-happens-when",
        "redis-that-fails-over",
        "a-broker-that-says-nothing",
        "a-queue-that-refuses-messages",
        "once-into-redis",
        "no-silent-stall",
        "dead-letters",
        "a-change-that-kills-its-process",
        "a-change-that-no-broker-takes",
        "full-queues",
        "under-random-faults",
    ):
        assert anchor in anchors, anchor


def anchors_of(text):
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {slugify(re.sub(r"\]\([^)]*\)|[`\[]", "", heading), "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


def test_external_links_are_well_formed():
    """The addresses are not requested: `make links` does that, and a test needs no network."""
    for name, text in PAGES.items():
        for url in EXTERNAL.findall(text):
            parts = urlsplit(url)
            assert parts.scheme == "https", (name, url)
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), (name, url)
            assert not re.search(r"[.,;:]$|%20|//", parts.path), (name, url)


def test_pages_with_examples_are_run_by_a_test():
    for name, text in PAGES.items():
        for example in examples(text):
            compile(example, name, "exec")
        if re.search(r"```(?:python|sql)\n|<!-- (?:file|run): ", text):
            assert f'"{name}"' in TESTS or f'/ "{name}"' in TESTS, f"{name}: no test names it"


def test_front_page_shows_the_handler_of_the_readme():
    (example,) = examples(PAGES["index.md"])
    assert example in README
