"""The documents say what is there, and their examples run."""

import dataclasses
import re
from pathlib import Path

import click
import pytest
from kombu.utils.json import loads

from flash_celery import on_change, on_message
from flash_celery.changes.change import Change, Insert, LogicalMessage, Update
from flash_celery.changes.deliveries import TRUNCATED, Delivery
from flash_celery.changes.payload import VERSION, encode
from flash_celery.changes.rows import Column, Origin, Table, Transaction
from flash_celery.cli import flash
from flash_celery.conditions.parsing import LOOKUPS
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.protocol.lsn import Lsn
from flash_celery.settings import Settings
from tests.docs.claims import pages, proofs, section_of, unproved
from tests.docs.pages import PAGES, README, commands, examples

from .test_architecture import ORDER, PACKAGE

ROOT = Path(__file__).parents[2]
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}


def test_readme_example_declares_its_handler(new_app, capsys):
    new_app()
    (example,) = examples(README)
    names = {"__name__": "readme"}
    exec(compile(example, "README.md", "exec"), names)
    (subscription,) = subscriptions_of(names["app"])
    assert str(subscription.table) == "public.orders"
    columns = tuple(
        Column(name, oid, "", identity=True)
        for name, oid in (("id", 23), ("status", 25), ("total", 1700))
    )
    table = Table("public", "orders", None, "f", ("id",), columns)
    origin = Origin(table, Transaction(Lsn(1), 1, 0), 0)
    names["reward"](Insert([b"5", b"paid", b"120"], origin))
    names["reward"](Update("O", [b"5", b"paid", b"120"], [b"5", b"paid", b"90"], origin))
    assert capsys.readouterr().out == "order 5 is paid: 120\norder 5 went from 120 to 90\n"
    names["app"].close()


def test_document_examples_run(app):
    class database:  # what the reader has
        @staticmethod
        def transaction(): ...

    for name in ("settings.md", "semantics.md", "monitoring.md", "operating.md", "security.md"):
        for example in examples(DOCS[name]):
            declare = {"on_change": on_change, "on_message": on_message}
            names = {"app": app, "database": database, **declare}
            exec(compile(example, name, "exec"), names)
    Settings.from_app(app)
    declared = [
        (subscription.handler.rpartition(".")[2], subscription.subject)
        for subscription in subscriptions_of(app)
    ]
    assert declared == [
        ("book", "public.orders"),
        ("index", "billing:public.invoices"),
        ("index", "public.orders"),
        ("order_paid", "messages 'order.paid'"),
        ("post", "public.order_lines"),
        ("post", "public.orders"),
    ]


def test_examples_of_ordered_handlers_declare_their_order(app):
    (example,) = examples(PAGES["howto/keep-the-order.md"])
    names = {"app": app, "on_change": on_change}
    exec(compile(example, "keep-the-order.md", "exec"), names)
    Settings.from_app(app)
    orders = {each.subject: each.ordered for each in subscriptions_of(app)}
    assert orders.keys() == {"public.orders", "public.order_lines", "public.accounts"}
    assert orders["public.orders"].by is None
    assert list(orders["public.order_lines"].by) == ["order_id"]
    assert list(orders["public.accounts"].by) == ["tenant_id"]
    assert orders["public.accounts"].on_failure == "block"


def test_examples_of_handlers_with_once_declare_their_databases(app):
    (example,) = examples(PAGES["howto/handle-once.md"])
    exec(compile(example, "handle-once.md", "exec"), {"app": app})
    databases = {each.subject: type(each.once).__name__ for each in subscriptions_of(app)}
    assert databases == {"public.payments": "_Engine", "public.orders": "_Function"}


def test_settings_are_documented_with_their_defaults():
    rows = re.findall(r"^\| `(flash_\w+)` \| `(.*?)` \|", DOCS["settings.md"], re.MULTILINE)
    documented = {name: eval(default) for name, default in rows}
    settings = {
        field.name: field.default
        if field.default is not dataclasses.MISSING
        else field.default_factory()
        for field in dataclasses.fields(Settings)
        if field.name.startswith("flash_")
    }
    assert documented == settings


def test_attributes_and_lookups_are_documented():
    public = {
        name
        for kind in (Change, Update, LogicalMessage)
        for name in (*vars(kind), *getattr(kind, "__slots__", ()))
        if not name.startswith("_")
    } - {"number", "ordinal", "part", "transaction"}
    for name in public:
        assert f"`{name}`" in DOCS["semantics.md"], name
    for lookup in LOOKUPS:
        if lookup != "eq":
            assert f"__{lookup}" in DOCS["semantics.md"], lookup


def test_lookups_are_in_the_reference():
    text = (ROOT / "docs" / "reference" / "lookups.md").read_text()
    table, _, _ = text.partition("## Types")
    assert {f"__{lookup}" for lookup in LOOKUPS if lookup != "eq"} == {
        name for row in table.splitlines() for name in re.findall(r"`(__\w+)`", row)
    }


@pytest.mark.parametrize("page", ["semantics.md", "reference/lookups.md"])
def test_claims_have_tests(page):
    assert unproved((ROOT / "docs" / page).read_text(), proofs(page)) == []


#: All sections of how-tos that claims.toml has. Those of the other pages are checked apart.
PROMISES = [
    (page, heading)
    for page in (
        "howto/backfill.md",
        "howto/from-on-commit.md",
        "howto/table-patterns.md",
        "howto/transactional-tasks.md",
        "howto/who-and-why.md",
    )
    for heading in proofs(page)
]


def test_no_claims_are_left_unchecked():
    checked = {"semantics.md", "reference/lookups.md", "reliability.md"}
    assert pages() == checked | {page for page, _ in PROMISES}


@pytest.mark.parametrize(("page", "heading"), PROMISES)
def test_promises_of_a_section_have_tests(page, heading):
    section, entries = section_of((ROOT / "docs" / page).read_text(), heading), proofs(page)
    assert unproved(section, {heading: entries[heading]}) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("# One\n\nIt is\nblue.\n\n- It is round.\n\n| a | b |\n|---|---|\n| c | d |", None),
        ("# One\n\nIt is blue.\n\n- It is round.\n\n| a | b |\n|---|---|\n| e | d |", "'One': e"),
        ("# One\n\nIt is blue.\n- It is round.\n- It is old.\n\n# Two", "It is old."),
        ("# One\n\nIt is blue.\n\nIt is blue, too.\n\n- It is round.", "two claims"),
        ("# One\n\nIt was blue.\n\n- It is round.", "no claim 'It is blue'"),
        ("# Two\n\nIt is blue.\n\n- It is round.", "no claim 'It is blue' under 'One'"),
    ],
)
def test_claims_and_their_entries_need_each_other(text, problem):
    name = "test_claims_and_their_entries_need_each_other"
    entries = {"One": {"It is blue": [name], "It is round": [name], "c": [name]}}
    problems = "\n".join(unproved(text, entries))
    assert problem in problems if problem else not problems
    assert "not there: {'test_nothing'}" in str(unproved(text, {"One": {"c": ["test_nothing"]}}))


def test_failure_table_rows_have_tests():
    heading = "What happens when"
    entries = proofs("reliability.md")
    assert len(entries[heading]) > 20
    assert unproved(DOCS["reliability.md"], entries, tables_of=heading) == []


@pytest.mark.parametrize(("name", "command"), list(commands(flash)))
def test_commands_are_documented_and_have_help(name, command):
    # The README names what one starts with.
    where = "".join(DOCS.values()) if " " in name else README
    assert f"flash {name}" in where
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


#: Options that the documents name, of other commands than ours.
ELSEWHERES = {"--auto-iam-authn", "--database", "--database-flags", "--docs", "--faults", "--pool"}


def test_documented_commands_and_options_exist():
    options = {
        name: {each for parameter in command.params for each in parameter.opts}
        for name, command in commands(flash)
    }
    known = set().union(*options.values(), ELSEWHERES)
    pages = [ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    for text in (README, *(page.read_text() for page in pages)):
        for named, rest in re.findall(r"\bflash ((?:[a-z]+ ?)+)([^`|\n]*)", text):
            first, *more = named.split()
            name = f"{first} {more[0]}" if more and f"{first} {more[0]}" in options else first
            assert name in options, f"flash {named}"
            mentioned = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", rest))
            assert mentioned <= options[name], f"flash {named}{rest}"
        assert set(re.findall(r"`(--[a-z][\w-]*)", text)) <= known


def test_links_in_the_documents_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "example_project/README.md"]
    for page in pages:
        for target in re.findall(r"(?:\]\(|src(?:set)?=\")([^)#:\"]+)[)#\"]", page.read_text()):
            assert (page.parent / target).exists(), (page, target)


def test_contributing_lists_the_packages_in_their_order():
    _, _, text = (ROOT / "CONTRIBUTING.md").read_text().partition("| package ")
    listed = re.findall(r"^\| `(\w+)/` \|", text.partition("\n\n")[0], re.MULTILINE)
    assert listed == [name for name in ORDER if (PACKAGE / name).is_dir()]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_documented_modules_exist(page):
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", (ROOT / page).read_text()):
        assert (PACKAGE / name).exists() or (ROOT / name).exists(), name


def test_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_wire_format_page_names_every_field():
    text = DOCS["wire-format.md"]
    columns = (Column("id", 20, "int8", identity=True),)
    table = Table("public", "t", None, "d", ("id",), columns, "billing")
    value = loads(encode([Delivery(table, Transaction(Lsn(1), 1, 0), 0, 0, 0, [TRUNCATED])]))
    assert f"version {VERSION}" in text
    for field in (*value, *value["tables"][0]):
        assert f"`{field}`" in text
