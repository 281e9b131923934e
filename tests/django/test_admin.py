"""The page in the admin: sources, lag, handlers, dead letters, and sending these back."""

import itertools
import re
from html import unescape
from types import SimpleNamespace

import psycopg
import pytest
import redis
from django.core.management import call_command
from psycopg import sql

from flash_celery import on_change
from flash_celery.backfill import requests
from flash_celery.dead_letters import letters
from flash_celery.dead_letters.queue import DeadLetterFilter, DeadLetterQueue
from flash_celery.postgres.source import Source
from flash_celery.provisioning.record import Record
from flash_celery.publishing import declared_queues
from flash_celery.publishing.brokers import for_app
from flash_celery.settings import Settings
from tests.conftest import Database

from .conftest import use

PAGE, RETRY = "/admin/flash_celery/status/", "/admin/flash_celery/status/retry/"
HOSTILE = "<script>alert(1)</script>\x1b[2J\u202e"
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def site_database(configured, postgres):
    """With the tables of the admin, which take their time to be made."""
    name = "admin_page"
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    database = Database(postgres, name)
    use(database)
    call_command("migrate", verbosity=0)
    yield database
    use(None)
    database.drop()


@pytest.fixture
def project(site_database, new_app, valkey, monkeypatch):
    use(site_database)
    with redis.Redis(port=valkey.port) as client:
        client.flushall()
    app = new_app(broker_url=valkey.url, flash_replication_slot=site_database.slot)

    @app.task(name="shop.handle", shared=False)
    def handle(change): ...

    on_change("public.sales_customer", "insert|update", fields=["full_name"])(handle)
    on_change("public.sales_order", "delete")(handle)
    yield app
    use(None)


def sign_in(*permissions, staff=True, superuser=False):
    from django.contrib.auth.models import Permission, User
    from django.contrib.contenttypes.models import ContentType
    from django.test import Client

    user = User.objects.create(username=next(_numbers), is_staff=staff, is_superuser=superuser)
    for name in permissions:
        kind, _ = ContentType.objects.get_or_create(app_label="flash_celery", model="status")
        permission, _ = Permission.objects.get_or_create(codename=name, content_type=kind)
        user.user_permissions.add(permission)
    client = Client(enforce_csrf_checks=True)
    client.force_login(user)
    return client


@pytest.fixture
def root(project):
    return sign_in(superuser=True)


def bury(app, *handlers, text="no", traceback="Traceback of it"):
    """Make a dead letter of each handler."""
    publisher = for_app(app)
    publisher.open([declared_queues.queue(app, "flash.dead")])
    for handler in handlers:
        number = next(_numbers)
        message = SimpleNamespace(
            headers={"id": f"letter-{number:02}", "task": handler, "argsrepr": f"change {number}"},
            properties={},
            body="[[], {}, {}]",
            content_type="application/json",
            content_encoding="utf-8",
        )
        letter = letters.from_message(
            message, "flash", error="ValueError", text=text, traceback=traceback
        )
        publisher.publish([letters.encode(app, letter, "flash.dead")])
    publisher.close()
    return DeadLetterQueue(app, "flash.dead")


def page(client):
    answer = client.get(PAGE)
    assert answer.status_code == 200
    return answer.content.decode()


def press(client, **fields):
    """Send the form with its token; the page that follows."""
    token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', page(client)).group(1)
    answer = client.post(RETRY, {"csrfmiddlewaretoken": token, **fields})
    assert (answer.status_code, answer.url) == (302, PAGE)
    return page(client)


def buttons(html, name="one"):
    return [unescape(value) for value in re.findall(rf'name="{name}" value="([^"]+)"', html)]


def test_admin_shows_sources_handlers_queues_and_the_slot(project, root, site_database):
    html = page(root)
    assert f"The slot {site_database.slot} does not exist yet" in html
    for text in ("Source (default)", "shop.handle", "public.sales_customer", "insert, update"):
        assert text in html
    assert "<td>full_name</td>" in html
    assert "<td>all</td>" in html
    assert "No Celery worker answers." in html
    assert "Dead letters: 0" in html
    with site_database.connect() as connection:
        connection.execute(
            "SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [site_database.slot]
        )
    try:
        html = page(root)
        assert f"{site_database.slot} (wal_status reserved)" in html
        assert "<strong>no worker</strong>" in html
        assert re.search(r"Lag</th><td>\d+ bytes", html)
    finally:
        site_database.execute(f"SELECT pg_drop_replication_slot('{site_database.slot}')")


def test_admin_shows_pauses(project, root, site_database):
    since = "2026-03-01T04:12:00+00:00"
    record = Record(paused={"": since, "shop.handle": since}, resuming={"<b>": since})
    comment = sql.SQL("COMMENT ON PUBLICATION flash_publication_insert IS {}")
    site_database.execute(
        "CREATE PUBLICATION flash_publication_insert",
        comment.format(sql.Literal(record.to_json())),
    )
    try:
        html = page(root)
    finally:
        site_database.execute("DROP PUBLICATION flash_publication_insert")
    assert f"Paused since {since}: nothing is read" in html
    assert f"shop.handle (paused since {since}): 0 held in flash.paused.shop.handle." in html
    assert "&lt;b&gt; (resuming since" in html


def test_admin_shows_backfills(project, root, site_database):
    with site_database.connect() as connection:
        source = Source(connection, Settings.from_app(project))
        draft = requests.Draft("shop.handle", "public.sales_customer", None, 100, 4000)
        (backfill,) = requests.request(source, [draft])
        try:
            requests.enter(connection, backfill.id, "paused", requests.ACTIVE, "<b>No.")
            html = page(root)
        finally:
            connection.execute(
                "DROP TABLE flash_celery_backfills, flash_celery_backfill_moves CASCADE"
            )
    assert "<td>0 of about 4000</td>" in html
    assert f"&lt;b&gt;No., then <code>flash backfill resume {backfill.id}</code>" in html


def test_admin_index_links_to_the_page(root):
    html = root.get("/admin/").content.decode()
    assert f'href="{PAGE}"' in html
    assert "Status and dead letters" in html


def test_admin_retries_one_or_the_chosen_dead_letters(project, root):
    box = bury(project, "shop.handle", "shop.handle", "shop.handle", "shop.handle")
    html = page(root)
    assert "Dead letters: 4" in html
    names = buttons(html)
    assert names == buttons(html, "letter")
    html = press(root, one=names[1], letter=[names[0]])
    assert "1 sent back to their handlers." in html
    assert buttons(html) == [names[0], *names[2:]]
    html = press(root, letter=[names[0], names[3], names[1]])
    assert "2 sent back to their handlers; 1 no longer in the queue." in html
    assert buttons(html) == [names[2]]
    assert "No dead letter is selected." in press(root)
    assert box.count() == 1
    with redis.Redis.from_url(project.conf.broker_url) as client:
        assert client.llen("flash") == 3


def test_admin_keeps_dead_letters_of_unknown_handlers(project, root):
    box = bury(project, "shop.gone")
    html = press(root, one=buttons(page(root))[0])

    assert "hop.gone is not a task of this app" in html
    assert box.count() == 1


def test_admin_checks_permissions(project):
    box = bury(project, "shop.handle")
    (name,) = (f"{letter.id} {letter.failed_at}" for letter in box.find(DeadLetterFilter()))
    for client in (sign_in(), sign_in("view_status", staff=False)):
        assert client.get(PAGE).status_code in (302, 403)
        assert client.post(RETRY, {"one": name}).status_code in (302, 403)
    looker, sender = sign_in("view_status"), sign_in("view_status", "change_status")
    html = page(looker)
    assert "change " in html
    assert not buttons(html)
    token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', html).group(1)
    denied = looker.post(RETRY, {"csrfmiddlewaretoken": token, "one": name})
    assert denied.status_code == 403
    assert sender.post(RETRY, {"one": name}).status_code == 403  # without the token
    assert sender.get(RETRY).status_code == 405
    assert box.count() == 1
    press(sender, one=name)
    assert box.count() == 0


def test_admin_escapes_dead_letters(project, root):
    bury(project, f"shop.{HOSTILE}", text=HOSTILE, traceback=f"File\n{HOSTILE}")
    html = page(root)
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[2J\\u202e" in html
    assert "\x1b" not in html
    assert "\u202e" not in html


def test_admin_shows_the_rest_without_postgresql(project, root):
    bury(project, "shop.handle")
    project.conf.flash_dsn = "postgresql://shop:hunter2@127.0.0.1:1/shop"
    html = page(root)
    assert "127.0.0.1" in html
    assert "Dead letters: 1" in html
    assert "hunter2" not in html
    assert "1 sent back" in press(root, one=buttons(html)[0])


def test_admin_shows_the_rest_without_the_broker(project, root):
    project.conf.update(broker_url="redis://:hunter2@127.0.0.1:1/0")
    html = page(root)
    assert "The broker redis://" in html
    assert "shop.handle" in html
    assert "does not exist yet" in html
    assert "hunter2" not in html


def test_admin_shows_each_source(project, root, site_database):
    project.conf.flash_sources = {
        "billing": {"dsn": site_database.dsn},
        "down": {"dsn": "host=127.0.0.1 port=1 dbname=down"},
    }
    html = page(root)
    for text in ("Source (default)", "Source billing", "Source down"):
        assert text in html
    assert f"The slot {site_database.slot}_billing does not exist yet" in html
    assert "Connection refused" in html or "cannot be reached" in html


def test_admin_shows_a_wrong_setting(project, root):
    project.conf.flash_replica_identity = "ato"
    assert "flash_replica_identity must be" in page(root)


def test_admin_shows_only_the_number_of_very_many_dead_letters(project, root, monkeypatch):
    from flash_celery.django import overview

    bury(project, "shop.handle", "shop.handle", "shop.handle")
    monkeypatch.setattr(overview, "MAX_SHOWN", 2)
    html = page(root)
    assert len(buttons(html)) == 2
    assert "the 2 oldest" in html
    monkeypatch.setattr(overview, "MAX_READ", 2)
    html = page(root)
    assert not buttons(html)
    assert "Dead letters: 3" in html
    assert "Too many for this page" in html


def test_admin_page_can_be_on_another_admin_site(project, root):
    bury(project, "shop.handle")
    html = root.get(PAGE.replace("admin", "operations")).content.decode()
    retry = RETRY.replace("admin", "operations")
    assert f'action="{retry}"' in html
    assert RETRY not in html
    token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', html).group(1)
    answer = root.post(retry, {"csrfmiddlewaretoken": token, "one": buttons(html)[0]})
    assert (answer.status_code, answer.url) == (302, PAGE.replace("admin", "operations"))
