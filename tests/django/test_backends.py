"""The backends for Django's Tasks: `django.tasks` (Django 6) and the package `django-tasks`."""

import asyncio
import sys
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec

import pytest
from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import connections, transaction
from django.test import override_settings
from django.utils import timezone

from flash_celery.testing import Live, carried_tasks
from tests.django.conftest import use

BACKENDS = {
    "django.tasks": "flash_celery.django.backends.TransactionalBackend",
    "django_tasks": "flash_celery.django.backends.backport.TransactionalBackend",
}


#: Django 6 has the first, `make django` runs the tests there.
INSTALLED = [api for api in BACKENDS if find_spec(api) is not None]


@pytest.fixture(params=INSTALLED)
def jobs(request, configured, database, new_app):
    """The module of tasks, with the backend for one of the two packages."""
    api = request.param
    use(database)
    app = new_app(
        broker_url="redis://localhost:1/0",
        result_backend="cache+memory://",
        result_extended=True,
        flash_dsn=database.dsn,
    )
    app.set_default()
    sys.modules.pop("flash_celery.django.backends.celery_task", None)
    import_module("flash_celery.django.backends.celery_task")  # registers the task, for this app
    tasks = {"default": {"BACKEND": BACKENDS[api], "QUEUES": ["default", "mail"]}}
    with override_settings(TASKS=tasks, TASKS_API=api):
        sys.modules.pop("sales.jobs", None)
        module = import_module("sales.jobs")
        module.done.clear()
        module.app, module.api = app, import_module(f"{api}.exceptions")
        yield module
    use(None)


async def enqueue_later(task, argument):
    """Enqueue a task, and close the connection of the thread in which Django does it."""

    def forget():
        connections["default"].close()
        del connections["default"]

    await task.aenqueue(argument)
    await sync_to_async(forget)()


def run(jobs, carried):
    """Run a task as a Celery worker does, and store its result."""
    task = jobs.app.tasks[carried.name]
    return task.apply(carried.args, carried.kwargs, task_id=carried.id)


def test_enqueue_writes_into_the_transaction_and_runs_on_celery(jobs):
    with carried_tasks() as tasks:
        with transaction.atomic():
            result = jobs.mail.enqueue(1, text="paid")
            with suppress(ZeroDivisionError), transaction.atomic():
                jobs.mail.enqueue(2)
                raise ZeroDivisionError
        assert jobs.mail.enqueue(3).status == "READY"  # a transaction of its own
        asyncio.run(enqueue_later(jobs.later, 4))
        with transaction.atomic():
            jobs.context.enqueue(5)
    assert tasks[0].id == result.id
    assert tasks[0].headers["shadow"] == "sales.jobs.mail"
    for carried in tasks:
        assert run(jobs, carried).successful()
    assert jobs.done == [(1, "paid"), (3, ""), 4, (1, 5)]


def test_queue_priority_and_moment_become_options_of_celery(jobs):
    soon = timezone.now() + timedelta(hours=1)
    with carried_tasks() as tasks:
        jobs.mail.using(queue_name="mail", run_after=soon).enqueue(1)
        for priority in (100, 50, 0, -100):
            jobs.mail.using(priority=priority).enqueue(priority)
    assert (tasks[0].queue, tasks[0].headers["eta"]) == ("mail", soon.isoformat())
    assert tasks[1].queue == jobs.app.conf.task_default_queue
    assert [task.priority for task in tasks[1:]] == [0, 2, 4, 9]
    with pytest.raises(jobs.api.TaskException):
        jobs.mail.using(queue_name="unknown")


def test_priorities_of_rabbitmq_need_queues_that_have_them(jobs):
    jobs.app.conf.broker_url = "amqp://localhost:1//"
    with pytest.raises(jobs.api.TaskException, match="priority"):
        jobs.mail.using(priority=100)
    jobs.app.conf.task_queue_max_priority = 10
    with carried_tasks() as tasks:
        for priority in (100, 0, -100):
            jobs.mail.using(priority=priority).enqueue(priority)
    assert [task.priority for task in tasks] == [10, 5, 0]


def test_backend_writes_into_the_database_that_is_named(jobs):
    connections.databases["ledger"] = connections.databases["default"]
    backend = {**settings.TASKS["default"], "OPTIONS": {"using": "ledger"}}
    try:
        with override_settings(TASKS={"default": backend}), carried_tasks() as tasks:
            with suppress(ZeroDivisionError), transaction.atomic():
                jobs.mail.enqueue(1)
                raise ZeroDivisionError
            with suppress(ZeroDivisionError), transaction.atomic("ledger"):
                jobs.mail.enqueue(2)
                raise ZeroDivisionError
    finally:
        connections["ledger"].close()
        del connections["ledger"]
        del connections.databases["ledger"]
    assert [task.args[3] for task in tasks] == [[1]]


def test_results_are_those_of_celery(jobs, monkeypatch):
    with carried_tasks() as tasks:
        result = jobs.mail.enqueue(1)
        failing = jobs.fails.enqueue()
    with pytest.raises(jobs.api.TaskResultDoesNotExist):
        jobs.mail.get_result(result.id)
    for carried in tasks:
        eager = run(jobs, carried)
        request = jobs.app.tasks[carried.name]._get_request()
        request.update(args=carried.args, kwargs={}, task=carried.name, id=carried.id)
        request.update(hostname="mail@host", retries=1)
        jobs.app.backend.store_result(
            carried.id, eager.result, eager.state, eager.traceback, request=request
        )
    result.refresh()
    assert (result.status, result.return_value) == ("SUCCESSFUL", {"order": 1})
    assert result.finished_at is not None
    assert (result.attempts, set(result.worker_ids)) == (2, {"mail@host"})
    failing.refresh()
    assert failing.status == "FAILED"
    assert failing.errors[0].exception_class is LookupError
    jobs.app.conf.result_extended = False
    with pytest.raises(NotImplementedError, match="result_extended"):
        jobs.mail.get_result(result.id)


def test_replication_worker_of_a_test_runs_what_was_enqueued(jobs):
    with Live(jobs.app) as live:
        with transaction.atomic():
            jobs.mail.enqueue(1, text="paid")
            with suppress(ZeroDivisionError), transaction.atomic():
                jobs.mail.enqueue(2)
                raise ZeroDivisionError
        jobs.context.enqueue(3)
        assert [run.result for run in live.wait_for()] == [{"order": 1}, None]
    assert jobs.done == [(1, "paid"), (1, 3)]


def test_messages_run_tasks_of_django_only(jobs):
    task = jobs.app.tasks["flash_celery.django_task"]
    api = jobs.mail.__class__.__module__.rpartition(".")[0]
    for path in ("sales.jobs.no_task", "os.getcwd"):
        with pytest.raises(TypeError, match="is no task of"):
            task.run(api, "default", path, [], {})
    with pytest.raises(Exception, match="is none of"):
        task.run("os", "default", "sales.jobs.mail", [], {})
    assert jobs.done == []


def test_backend_without_the_app_is_refused(jobs):
    """Celery's workers would discard its tasks, which they do not know."""
    without = [name for name in settings.INSTALLED_APPS if name != "flash_celery.django"]
    tasks = {"default": {**settings.TASKS["default"], "QUEUES": []}}
    with (
        override_settings(INSTALLED_APPS=without, TASKS=tasks),
        pytest.raises(ImproperlyConfigured, match=r"needs 'flash_celery\.django' in INSTALLED"),
    ):
        jobs.mail.enqueue(1)


def test_no_module_of_the_app_is_called_tasks():
    """Celery imports such a module from every installed app."""
    with pytest.raises(ModuleNotFoundError):
        import_module("flash_celery.django.tasks")
