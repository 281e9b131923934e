"""Contexts with Django: the middleware, savepoints, and what handlers write."""

import ast
import asyncio
import re
from contextlib import suppress

import pytest
from django.conf import settings
from django.db import IntegrityError, connection, connections, transaction
from django.http import HttpResponse
from django.test import AsyncRequestFactory, Client, RequestFactory, override_settings
from django.urls import path
from django.utils.functional import SimpleLazyObject

from flash_celery import context, on_change
from flash_celery.django.middleware import ContextMiddleware
from flash_celery.handlers.written_context import warn_of_missing_privilege
from tests.django.conftest import use
from tests.docs.conftest import Page

WHO_AND_WHY = Page("howto/who-and-why.md")

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, name text)"
HEADERS = {"x-request-id": "r-1", "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7-01"}


def add(number):
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO items VALUES (%s, '%%') RETURNING id", [number])
        assert cursor.fetchall() == [(number,)]
        assert cursor.rowcount == 1


def read():
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM items WHERE id > %s", [0])
        return cursor.fetchone()[0]


class Anonymous:
    is_authenticated = False


class User:
    is_authenticated = True
    pk = 7


def by(view, user=User, **headers):
    """Handle a request with a view."""
    request = RequestFactory(headers={**HEADERS, **headers}).get("/orders/")
    request.user = SimpleLazyObject(user)
    return ContextMiddleware(lambda request: view())(request)


@pytest.fixture(params=["binds itself", "server binds"])
def site(request, configured, flash):
    """A replication worker, and a slot that counts the messages."""
    options = {"OPTIONS": {"server_side_binding": True}} if request.param != "binds itself" else {}
    flash.database.execute(ITEMS, "CREATE PUBLICATION nothing")
    flash.database.execute("SELECT pg_create_logical_replication_slot('counted', 'pgoutput')")
    use(flash.database, **options)
    flash.together = request.param == "binds itself"
    flash.handler("items").start()
    yield flash
    use(None)
    flash.database.execute("SELECT pg_drop_replication_slot('counted')")


def test_other_wrappers_see_the_statement_of_the_application_alone(site):
    seen = []

    def note(execute, sql, params, many, wrapped):
        result = execute(sql, params, many, wrapped)
        seen.append((sql, wrapped["cursor"].cursor.rowcount))
        return result

    with transaction.atomic(), context(connection, user=7), connection.execute_wrapper(note):
        add(1)
    assert seen == [("INSERT INTO items VALUES (%s, '%%') RETURNING id", 1)]
    site.do("SELECT 1")
    (change,) = site.delivered()
    assert dict(change.context) == {"user": 7}


def contexts(flash):
    flash.do("SELECT 1")
    return [(change.new["id"], dict(change.context)) for change in flash.delivered()]


def messages(flash):
    """How many contexts were written since the last call, by transactions that have committed."""
    return flash.database.one(
        "SELECT count(*) FROM pg_logical_slot_get_binary_changes('counted', NULL, NULL, "
        "'proto_version', '1', 'publication_names', 'nothing', 'messages', 'on') "
        "WHERE position('flash.context'::bytea IN data) > 0"
    )


FROM_REQUEST = {"user": 7, "path": "/orders/", "request_id": "r-1", **HEADERS}
del FROM_REQUEST["x-request-id"]


def test_middleware_writes_one_context_in_a_transaction_that_writes(site):
    def view():
        assert read() == 0
        with transaction.atomic():
            read()
            add(1)
            add(2)
            read()
        with transaction.atomic():
            add(3)

    by(view)
    add(4)
    assert contexts(site) == [*((n, FROM_REQUEST) for n in (1, 2, 3)), (4, {})]
    assert messages(site) == 2


def test_transaction_that_only_reads_has_no_context(site):
    def view():
        read()
        with transaction.atomic():
            read()
            with transaction.atomic():
                read()

    by(view)
    with context("default", user=8):
        read()
    # Nothing at all was written: a context would also give the transaction an id.
    wrote = "SELECT count(*) FROM pg_stat_activity WHERE backend_xid IS NOT NULL"
    assert site.database.one(wrote) == 0
    assert messages(site) == 0


def test_context_is_written_again_after_a_rollback_to_a_savepoint(site):
    def view():
        with transaction.atomic():
            for number, error in ((1, IntegrityError), (3, ZeroDivisionError)):
                with suppress(error), transaction.atomic():
                    add(number)
                    add(1 // (number - 3) + 2 if number == 3 else 1)
                add(number + 1)
            with connection.cursor() as cursor:
                cursor.executemany("INSERT INTO items VALUES (%s)", [(5,), (6,)])

    by(view)
    assert contexts(site) == [(n, FROM_REQUEST) for n in (2, 4, 5, 6)]
    assert messages(site) == 1


def test_context_ends_with_its_block_also_after_a_rollback_to_a_savepoint(site):
    with transaction.atomic():
        with context("default", why="block"):
            add(1)
            with suppress(ZeroDivisionError), transaction.atomic():
                add(2)
                raise ZeroDivisionError
        add(3)
    assert contexts(site) == [(1, {"why": "block"}), (3, {})]


def test_context_of_a_block_is_added_and_ends_with_it(site):
    def view():
        with transaction.atomic():
            add(1)
            with context(connection, why="a % b", user=9):
                add(2)
            add(3)
        with context("default", why="alone"):
            add(4)

    by(view, user=Anonymous, traceparent="")
    request = {"path": "/orders/", "request_id": "r-1"}
    inner = {**request, "why": "a % b", "user": 9}
    # A statement that commits by itself is sent in one round trip with its context, if it can be.
    alone = {**request, "why": "alone"} if site.together else {}
    assert contexts(site) == [(1, request), (2, inner), (3, request), (4, alone)]
    assert messages(site) == (4 if site.together else 3)


def test_user_is_asked_for_in_the_transaction_and_cannot_make_it_fail(site):
    def asked():
        read()
        return User()

    def failing():
        raise LookupError("no session")

    def view():
        with transaction.atomic():
            add(read() + 1)

    by(view, user=asked)
    by(view, user=failing)
    by(view, user=asked, **{"x-request-id": "ä" * 9999})
    found = contexts(site)
    assert [row for row, _ in found] == [1, 2, 3]
    assert [values.get("user") for _, values in found] == [7, None, 7]


def test_middleware_works_in_asynchronous_requests(site):
    from asgiref.sync import sync_to_async

    def write():
        try:
            with transaction.atomic():
                add(1)
        finally:
            connection.close()
            del connections["default"]  # that of this thread

    async def view(request):
        await sync_to_async(write)()

    async def handle():
        request = AsyncRequestFactory().get("/orders/")
        request.user = User()
        await ContextMiddleware(view)(request)

    asyncio.run(handle())
    assert contexts(site) == [(1, {"user": 7, "path": "/orders/"})]


def test_middleware_works_in_the_stack_of_a_project(site):
    (line,) = re.findall(r"^    MIDDLEWARE = (.*)$", WHO_AND_WHY.text, re.MULTILINE)
    _, *ours = ast.literal_eval(line)
    connections.databases["ledger"] = connections.databases["default"]

    def view(request):
        with transaction.atomic(), transaction.atomic("ledger"):
            add(1)
            with connections["ledger"].cursor() as cursor:
                cursor.execute("INSERT INTO items VALUES (2)")
        return HttpResponse()

    try:
        with override_settings(
            ROOT_URLCONF=(path("orders/", view),), MIDDLEWARE=[*settings.MIDDLEWARE, *ours]
        ):
            Client().get("/orders/", headers=HEADERS)
    finally:
        connections["ledger"].close()
        del connections["ledger"]
        del connections.databases["ledger"]
    anonymous = {name: value for name, value in FROM_REQUEST.items() if name != "user"}
    assert sorted(contexts(site)) == [(1, anonymous), (2, anonymous)]


def test_example_of_the_page_says_more_of_a_request(site):
    names = {}
    (example,) = [each for each in WHO_AND_WHY.python() if "ContextMiddleware" in each]
    exec(example, names)

    def view(request):
        with transaction.atomic():
            add(1)

    request = RequestFactory(headers=HEADERS).get("/orders/")
    request.user = User()
    names["ShopContext"](view)(request)
    assert contexts(site) == [(1, {**FROM_REQUEST, "tenant": "testserver"})]


def test_handler_writes_with_its_context(site):
    @site.app.task(name="count", shared=False)
    def count(change):
        with transaction.atomic():
            add(change.new["id"] + 1)

    on_change("items", ignore_own=True)(count)
    site.stop()
    site.start()
    site.do("INSERT INTO items VALUES (1, '')")
    (change,) = site.delivered("count")
    count.apply(args=[change], throw=True)
    site.do("SELECT 1")
    assert site.delivered("count") == []
    own = {"handler": "count", "change": change.id, "depth": 1}
    assert contexts(site) == [(1, {}), (2, own)]


def test_role_that_may_not_write_contexts_writes_without(site, caplog):
    role = f"{site.database.name}_writer"
    site.database.execute(f"CREATE ROLE {role} LOGIN", f"GRANT INSERT, SELECT ON items TO {role}")
    revoke = (
        "DO $$ DECLARE f regprocedure; BEGIN FOR f IN SELECT oid FROM pg_proc WHERE proname = "
        "'pg_logical_emit_message' LOOP EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC'"
        ", f); END LOOP; END $$"
    )
    site.database.execute(revoke)
    use(site.database, USER=role)

    def view():
        with transaction.atomic():
            add(1)

    warn_of_missing_privilege.cache_clear()
    by(view)
    assert contexts(site) == [(1, {})]
    assert caplog.text.count("have no context, because the role may not call") == 1
