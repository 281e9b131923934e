"""Declared handlers in several processes, whose hash seeds and addresses differ."""

import os
import subprocess
import sys

DECLARED = """
from celery import Celery
from psycopg import adapters
from psycopg.types.json import Jsonb
from psycopg.types.string import StrDumper
from flash_celery import on_change
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.messages.task_options import TaskOptions
from flash_celery.messages.templates import Templates
from flash_celery.settings import Settings

class Colour:
    def __str__(self):
        return "red"

class ColourDumper(StrDumper):
    def dump(self, value):
        return super().dump(str(value))

adapters.register_dumper(Colour, ColourDumper)
app = Celery("shop", broker="memory://", set_as_current=False)
app.conf.update(flash_dsn="postgresql://", flash_routes={"*.*.*": {"headers": {"a": 1}}})
names = {"alpha", "beta", "gamma", "delta"}

@on_change("orders", {"insert", "update"}, fields=names, key=names, where=[
    {"colour": Colour(), "tags": [Colour()], name: 1, f"{name}__in": names,
     "hue__not_in": {Colour(), "blue"}, "data": Jsonb({"long": "x" * 200, "n": %s})}
    for name in names])
@app.task(name="handle", shared=False)
def handle(change): ...

declared = subscriptions_of(app)
settings = Settings.from_app(app)
print(declared, Templates(app, settings, TaskOptions(app, settings, declared)).keys)
"""


def test_declarations_are_the_same_in_every_process():
    def declared(seed, number=1):
        # What differs moves everything that the process makes.
        code = f"kept = [object() for _ in range({seed} * 1000)]\n" + DECLARED % number
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        return subprocess.check_output(
            [sys.executable, "-c", code], env=environment, text=True, timeout=120
        )

    assert declared(1) == declared(2)
    assert declared(1) != declared(1, 2)
