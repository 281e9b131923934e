import asyncio
import functools
import sys
import types

import pytest
from celery import Celery, Task, shared_task

from flash_celery import Batch, Changes, Insert, Operation, on_change, on_message
from flash_celery.changes.rows import Column, Origin, Table, Transaction
from flash_celery.errors import SubscriptionError
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.protocol.lsn import Lsn

CHANGE = Insert(
    [b"1"],
    Origin(
        Table("public", "orders", None, "d", ("id",), (Column("id", 20, "int8", identity=True),)),
        Transaction(Lsn(1), 1, 0),
        0,
    ),
)


def declared(app):
    return [(s.handler.rpartition(".")[2], str(s.table)) for s in subscriptions_of(app)]


def test_on_change_above_a_shared_task(app):
    @on_change("orders")
    @shared_task
    def handle(change):
        return change.id

    assert declared(app) == [("handle", "public.orders")]
    assert handle.delay(CHANGE).get() == "0/1:0"


def test_on_change_below_a_bound_shared_task(app):
    @shared_task(bind=True, max_retries=5)
    @on_change("orders")
    def handle(self, change):
        return self.max_retries, change.id

    assert declared(app) == [("handle", "public.orders")]
    assert handle.delay(CHANGE).get() == (5, "0/1:0")
    assert handle(CHANGE) == (5, "0/1:0")


@pytest.mark.parametrize("lazy", [True, False])
def test_on_change_above_and_below_an_app_task(app, lazy):
    @on_change("orders")
    @app.task(lazy=lazy)
    @on_change("customers")
    def handle(change):
        return change.id

    assert sorted(declared(app)) == [("handle", "public.customers"), ("handle", "public.orders")]
    assert handle.delay(CHANGE).get() == "0/1:0"


def test_on_change_makes_a_task_of_a_plain_function(app):
    @on_change("orders", "insert")
    @on_change("customers", "insert")
    def handle(change):
        return change.id

    assert sorted(declared(app)) == [("handle", "public.customers"), ("handle", "public.orders")]
    assert handle(CHANGE) == handle.delay(CHANGE).get() == "0/1:0"
    assert handle.name in app.tasks


MODULE = """
import functools
from flash_celery import on_change
from celery import Celery

def sync(change):
    return "sync"

handler = on_change("orders")(sync)

def timed(function):
    @functools.wraps(function)
    def run(change):
        return "timed " + function(change)
    return run

@timed
@on_change("customers")
def wrapped(change):
    return "wrapped"

def told(what, change):
    return what

part = on_change("parts")(functools.update_wrapper(functools.partial(told, "part"), told))
other = Celery("other", set_as_current=False)

@other.task(shared=False)
@on_change("others")
def elsewhere(change): ...
"""


def test_on_change_on_a_function_with_another_name_in_its_module(app, monkeypatch):
    """It is a task all the same: as what wraps it, where something does."""
    module = types.ModuleType("a_shop")
    monkeypatch.setitem(sys.modules, "a_shop", module)
    exec(MODULE, module.__dict__)
    tasks = {
        str(subscription.table): app.tasks[subscription.handler]
        for subscription in subscriptions_of(app)
    }
    assert {table: task.name for table, task in tasks.items()} == {
        "public.orders": "a_shop.sync",
        "public.customers": "a_shop.wrapped",
        "public.parts": "a_shop.told",
    }
    assert {task.delay(CHANGE).get() for task in tasks.values()} == {
        "sync",
        "timed wrapped",
        "part",
    }
    assert module.handler.delay(CHANGE).get() == "sync"
    assert ("elsewhere", "public.others") in declared(module.other)
    module.other.close()


@pytest.mark.parametrize("target", [functools.partial(print), object(), Batch])
def test_on_change_refuses_anything_but_a_function(target):
    with pytest.raises(SubscriptionError, match="on_change decorates a task or a function, not"):
        on_change("orders")(target)


def test_on_change_keeps_autoretry_for(app):
    calls = []

    @shared_task(autoretry_for=(OSError,), max_retries=2, default_retry_delay=0)
    @on_change("orders")
    def handle(change):
        calls.append(change.id)
        if len(calls) < 2:
            raise OSError
        return len(calls)

    assert handle.delay(CHANGE).get() == 2


def test_on_change_does_not_finalize_the_app(app):
    @on_change("orders")
    @shared_task
    def handle(change): ...

    @on_change("orders")
    @app.task
    def other(change): ...

    assert not app.finalized


def test_on_change_keeps_the_tasks_of_two_apps_apart(app):
    other = Celery("other", set_as_current=False)

    @on_change("orders")
    @other.task
    def handle(change): ...

    assert declared(app) == []
    assert declared(other) == [("handle", "public.orders")]
    other.close()


def test_handlers_survive_their_process_by_default(app):
    @on_change("orders")
    def careful(change): ...

    @on_change("orders", acks_late=False)
    def careless(change): ...

    subscriptions_of(app)
    assert (careful.acks_late, careful.reject_on_worker_lost) == (True, True)
    assert careless.acks_late is False


def test_subscriptions_are_numbered_as_they_are_declared(app):
    @shared_task
    def handle(change): ...

    for number in range(8):
        on_change(f"table_{number}")(handle)

    numbered = [
        (subscription.table.name, subscription.number) for subscription in subscriptions_of(app)
    ]
    assert numbered == [(f"table_{number}", number) for number in range(8)]


def test_subscriptions_are_numbered_across_sources(app):
    @on_message("order.paid", source="billing")
    @on_change("billing:public.invoices")
    @on_change("orders")
    @shared_task
    def handle(change): ...

    @on_change(CHANGE.table, source="billing")
    @on_change("billing:orders", source="billing")
    def other(change): ...

    numbered = [
        (subscription.source, subscription.subject, subscription.number)
        for subscription in subscriptions_of(app)
    ]
    assert sorted(numbered) == [
        ("", "public.orders", 0),
        ("billing", "billing:public.invoices", 1),
        ("billing", "billing:public.orders", 0),
        ("billing", "billing:public.orders", 1),
        ("billing", "messages billing:'order.paid'", 2),
    ]


def test_on_change_refuses_contradicting_declarations(app):
    @on_change("orders", batch=10)
    @on_change("customers")
    def handle(change): ...

    with pytest.raises(SubscriptionError, match="with a contradiction: batch= is None"):
        subscriptions_of(app)


def test_subscription_captures_the_operations_that_it_needs(app):
    @on_change("orders", "insert", where={"status": "paid"})
    def entered(change): ...

    @on_change("orders", "delete", key=["number"])
    def left(change): ...

    @on_change("orders", "update", fields=["status"], batch=Batch(5, 0.1))
    def changed(change): ...

    by_name = {s.handler.rpartition(".")[2]: s for s in subscriptions_of(app)}
    assert by_name["entered"].captured == Operation.INSERT | Operation.UPDATE
    assert by_name["entered"].old_columns(Operation.UPDATE) == {"status"}
    assert by_name["left"].captured == Operation.UPDATE | Operation.DELETE
    assert by_name["changed"].old_columns(Operation.UPDATE) == {"status"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"operations": "insert|upsert"}, "no operation 'upsert'"),
        ({"operations": []}, "no operation"),
        ({"where": {"total__gt3": 1}}, "no lookup __gt3"),
        ({"where": {}}, "empty dict"),
        ({"where": {"total__between": [1]}}, "two values"),
        ({"fields": "status"}, "list of column names"),
        ({"batch": 0}, "at least 1"),
        ({"batch": True}, "number of changes"),
        ({"source": 5}, "source= is a name"),
    ],
)
def test_on_change_names_the_handler_of_invalid_arguments(app, arguments, sentence):
    @on_change("orders", **arguments)
    @shared_task
    def handle(change): ...

    with pytest.raises(SubscriptionError, match=rf"test_handlers\.handle: .*{sentence}"):
        subscriptions_of(app)


def test_batch_reaches_its_handler(app):
    @on_change("orders", batch=10)
    def handle(changes):
        return [change.id for change in changes]

    assert handle.delay(Changes([CHANGE, CHANGE])).get() == ["0/1:0", "0/1:0"]


async def async_function(change):
    return change.id


async def async_generator(change):
    yield change.id


def generator(change):
    yield change.id


def above(app, function):
    return on_change("orders")(app.task(function))


def below(app, function):
    return app.task(on_change("orders")(function))


def binding(app, function):
    return app.task(bind=True)(on_change("orders")(function))


def retrying(app, function):
    return on_change("orders")(app.task(autoretry_for=(ValueError,))(function))


def alone(app, function):
    # Its module calls nothing else by this name.
    function.__qualname__ = f"<locals>.{function.__name__}"
    return on_change("orders")(function)


def pydantic(app, function):
    return on_change("orders")(app.task(pydantic=True, ignore_result=True)(function))


def pydantic_below(app, function):
    return app.task(pydantic=True)(on_change("orders")(function))


def class_based(app, function):
    async def run(self, change): ...

    def run_generator(self, change):
        yield

    run = run_generator if function is generator else run
    task = type("Own", (Task,), {"name": function.__name__, "run": run})()
    return on_change("orders")(app.register_task(task))


def calling(app, function):
    """The class of the task has an async `__call__`."""
    own = type("Own", (Task,), {"__call__": function})

    @on_change("orders")
    @app.task(base=own, name=function.__name__)
    def handle(change): ...


@pytest.mark.parametrize(
    "declare",
    [
        *(above, below, binding, retrying, alone),
        *(pydantic, pydantic_below, class_based, calling),
    ],
)
@pytest.mark.parametrize("function", [async_function, async_generator, generator])
def test_on_change_refuses_generators_and_async_functions(app, declare, function):
    declare(app, function)
    with pytest.raises(SubscriptionError, match=f"{function.__name__}: it is an? .*never runs"):
        subscriptions_of(app)


@pytest.mark.parametrize("declare", [above, below, retrying, alone])
def test_on_change_accepts_a_wrapped_async_function(app, declare):
    @functools.wraps(async_function)
    def handle(change):
        return asyncio.run(async_function(change))

    declare(app, handle)
    (subscription,) = subscriptions_of(app)
    assert app.tasks[subscription.handler].delay(CHANGE).get() == "0/1:0"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("declare", [above, below, retrying, alone, pydantic])
@pytest.mark.parametrize("function", [async_function, async_generator, generator])
def test_wrapper_that_hides_an_async_function_fails_its_task(app, declare, function):
    @functools.wraps(function)
    def handle(change):
        return function(change)

    declare(app, handle)
    (subscription,) = subscriptions_of(app)
    with pytest.raises(SubscriptionError, match="which Celery never runs"):
        app.tasks[subscription.handler].delay(CHANGE).get()


def test_handler_may_return_a_generator_expression(app):
    @on_change("orders")
    @app.task
    def handle(change):
        return (name for name in change.new)

    assert list(handle.run(CHANGE)) == list(CHANGE.new)


def no_argument(): ...
def unbound(self, change): ...
def two(change, reason): ...
def keyword(change, *, reason): ...


@pytest.mark.parametrize("declare", [above, below, retrying, alone])
@pytest.mark.parametrize("function", [no_argument, unbound, two, keyword])
def test_on_change_refuses_a_function_that_takes_no_change(app, declare, function):
    declare(app, function)
    with pytest.raises(SubscriptionError, match="called with one argument, the change, and would"):
        subscriptions_of(app)


@pytest.mark.parametrize(
    "function",
    [
        lambda change, reason=None: change.id,
        lambda *arguments: arguments[0].id,
        lambda change, /, **more: change.id,
    ],
)
@pytest.mark.parametrize("declare", [below, alone])
def test_on_change_accepts_a_function_with_more_parameters(app, declare, function):
    function.__name__ = "handle"
    declare(app, function)
    (subscription,) = subscriptions_of(app)
    assert app.tasks[subscription.handler].delay(CHANGE).get() == "0/1:0"


def test_on_change_accepts_a_task_without_argument_checks(app):
    on_change("orders")(app.task(typing=False)(two))
    assert len(subscriptions_of(app)) == 1
