"""The backend, for either of the two packages with Django's Tasks API."""

from __future__ import annotations

import uuid
from functools import cache
from importlib import import_module
from typing import Any

from celery import current_app, states
from celery.result import AsyncResult
from django.apps import apps
from django.core.exceptions import ImproperlyConfigured
from django.utils import timezone
from django.utils.module_loading import import_string

from ...transactional_tasks.blocks import transactional
from .celery_task import django_task

#: The status of a result, by Celery's state.
_STATUS = {
    states.STARTED: "RUNNING",
    states.RETRY: "READY",
    states.SUCCESS: "SUCCESSFUL",
    states.FAILURE: "FAILED",
    states.REVOKED: "FAILED",
}
#: The app that registers the Celery task.
_APP = "flash_celery.django"
#: The range of priorities of Django, where higher ones come first.
_LOWEST, _HIGHEST = -100, 100
#: The lowest priority of kombu's Redis transport, where 0 comes first.
_LAST_ON_REDIS = 9


@cache
def backend_for(api: str) -> type:
    """Return the class of the backend for `django.tasks` or `django_tasks`."""
    base = import_module(f"{api}.base")
    bases = _Carried, import_module(f"{api}.backends.base").BaseTaskBackend
    attributes = {
        "__module__": __name__,
        "__doc__": f"Enqueue tasks of {api} by the commit of the transaction.",
        "api": api,
        "base": base,
        "signals": import_module(f"{api}.signals"),
        "exceptions": import_module(f"{api}.exceptions"),
    }
    return type("TransactionalBackend", bases, attributes)


class _Carried:
    """A task is written into the transaction, and runs on Celery's workers.

    Without a transaction it is one of its own. OPTIONS: `using`, the alias of the database.
    """

    api: str
    base: Any
    signals: Any
    exceptions: Any
    alias: str
    options: dict[str, Any]

    def __init__(self, alias: str, params: dict[str, Any]) -> None:
        super().__init__(alias, params)  # type: ignore[call-arg]
        if apps.ready and not apps.is_installed(_APP):
            # A worker registers the task when it loads the app, and discards unknown tasks.
            raise ImproperlyConfigured(
                f"TASKS[{alias!r}] needs {_APP!r} in INSTALLED_APPS, so that Celery's workers know "
                "its task."
            )

    supports_defer = True
    supports_async_task = True

    @property
    def supports_priority(self) -> bool:
        """Whether the queues have priorities: on Redis, or with `task_queue_max_priority`."""
        return self._on_redis or bool(current_app.conf.task_queue_max_priority)

    @property
    def supports_get_result(self) -> bool:
        """Whether Celery stores results with the name and arguments of the task."""
        conf = current_app.conf
        return bool(conf.result_backend and conf.result_extended)

    @property
    def _on_redis(self) -> bool:
        connection = current_app.connection_for_write()
        return str(connection.transport.driver_type) == "redis"

    def enqueue(self, task: Any, args: Any, kwargs: Any) -> Any:
        """Write a task into the transaction."""
        self.validate_task(task)  # type: ignore[attr-defined]
        result = self._result(task, str(uuid.uuid4()), "READY", args, kwargs)
        options: dict[str, Any] = {"task_id": result.id, "shadow": task.module_path}
        if task.queue_name != "default":
            options["queue"] = task.queue_name
        if task.run_after is not None:
            options["eta"] = task.run_after
        if self.supports_priority:
            options["priority"] = self._priority(task.priority)
        arguments = [self.api, self.alias, task.module_path, result.args, result.kwargs]
        with transactional(using=self.options.get("using", "default"), strict=False):
            django_task.apply_async(arguments, **options)
        object.__setattr__(result, "enqueued_at", timezone.now())
        self.signals.task_enqueued.send(type(self), task_result=result)
        return result

    def _priority(self, priority: int) -> int:
        """Return a priority of the broker for one of Django."""
        share = (priority - _LOWEST) / (_HIGHEST - _LOWEST)
        if self._on_redis:
            return round((1 - share) * _LAST_ON_REDIS)
        return round(share * int(current_app.conf.task_queue_max_priority))

    def _result(self, task: Any, id: str, status: str, args: Any, kwargs: Any) -> Any:
        return self.base.TaskResult(
            task=task,
            id=id,
            status=self.base.TaskResultStatus[status],
            enqueued_at=None,
            started_at=None,
            last_attempted_at=None,
            finished_at=None,
            args=args,
            kwargs=kwargs,
            backend=self.alias,
            errors=[],
            worker_ids=[],
        )

    def _task(self, path: str) -> Any:
        """Return the task at an import path; anything else there is refused."""
        task = import_string(path)
        if not isinstance(task, self.base.Task):
            raise TypeError(f"{path!r:.200} is no task of {self.api}.")
        return task

    def execute(self, request: Any, path: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Run a task in a Celery worker, and return its result."""
        result = self._result(self._task(path), request.id, "RUNNING", args, kwargs)
        now = timezone.now()
        for name in ("started_at", "last_attempted_at"):
            object.__setattr__(result, name, now)
        result.worker_ids.extend([str(request.hostname)] * (request.retries + 1))
        self.signals.task_started.send(type(self), task_result=result)
        context = [self.base.TaskContext(task_result=result)] if result.task.takes_context else []
        try:
            value = self.base.normalize_json(result.task.call(*context, *args, **kwargs))
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt):
                self._finish(result, "FAILED")
            raise
        object.__setattr__(result, "_return_value", value)
        self._finish(result, "SUCCESSFUL")
        return value

    def _finish(self, result: Any, status: str) -> None:
        object.__setattr__(result, "status", self.base.TaskResultStatus[status])
        object.__setattr__(result, "finished_at", timezone.now())
        self.signals.task_finished.send(type(self), task_result=result)

    def get_result(self, result_id: str) -> Any:
        """Return a result that Celery has stored.

        Raises:
            NotImplementedError: Celery does not store it with its arguments (`result_extended`).
            TaskResultDoesNotExist: It has stored none, as before the task starts.
        """
        if not self.supports_get_result:
            raise NotImplementedError("Set result_backend and result_extended to read results.")
        stored = AsyncResult(result_id)
        arguments = stored.args
        if stored.state == states.PENDING or stored.name != django_task.name or not arguments:
            raise self.exceptions.TaskResultDoesNotExist(result_id)
        _, _, path, args, kwargs = arguments
        status = _STATUS.get(stored.state, "READY")
        result = self._result(self._task(path), result_id, status, args, kwargs)
        if stored.worker is not None:
            result.worker_ids.extend([stored.worker] * ((stored.retries or 0) + 1))
        if status == "SUCCESSFUL":
            object.__setattr__(result, "_return_value", stored.result)
        if status == "FAILED":
            error = type(stored.result)
            name = f"{error.__module__}.{error.__qualname__}"
            result.errors.append(
                self.base.TaskError(exception_class_path=name, traceback=stored.traceback or "")
            )
        if stored.date_done is not None:
            object.__setattr__(result, "finished_at", stored.date_done)
        return result
