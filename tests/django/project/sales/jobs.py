"""Tasks of Django's Tasks, of either package."""

from importlib import import_module

from django.conf import settings

task = import_module(settings.TASKS_API).task
done = []


@task
def mail(order, text=""):
    done.append((order, text))
    return {"order": order}


@task(takes_context=True)
def context(context, order):
    done.append((context.attempt, order))


@task
async def later(order):
    done.append(order)


@task
def fails():
    raise LookupError("no such order")


def no_task():
    done.append("ran")
