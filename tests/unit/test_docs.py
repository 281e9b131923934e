import re
from pathlib import Path

import celery._state
from kombu.utils.json import loads

from flash_celery.changes import Column, Table, Transaction
from flash_celery.handlers import subscriptions_of
from flash_celery.payload import TRUNCATED, VERSION, Delivery, encode
from flash_celery.protocol.lsn import Lsn

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_readmes_example_runs(monkeypatch):
    monkeypatch.setattr(celery._state, "_on_app_finalizers", set(celery._state._on_app_finalizers))
    for example in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        names = {"__name__": "readme"}
        exec(compile(example, "README.md", "exec"), names)
        (subscription,) = subscriptions_of(names["app"])
        assert str(subscription.table) == "public.orders"
        names["app"].close()


def test_the_wire_format_names_every_field():
    text = (ROOT / "docs" / "wire-format.md").read_text()
    table = Table("public", "t", None, "d", ("id",), (Column("id", 20, "int8", identity=True),))
    value = loads(encode([Delivery(table, Transaction(Lsn(1), 1, 0), 0, 0, 0, TRUNCATED)]))
    assert f"version {VERSION}" in text
    for field in (*value, *value["tables"][0]):
        assert f"`{field}`" in text
