import re
from pathlib import Path

import celery._state

from flash_celery.handlers import subscriptions_of

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_readmes_example_runs(monkeypatch):
    monkeypatch.setattr(celery._state, "_on_app_finalizers", set(celery._state._on_app_finalizers))
    for example in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        names = {"__name__": "readme"}
        exec(compile(example, "README.md", "exec"), names)
        (subscription,) = subscriptions_of(names["app"])
        assert str(subscription.table) == "public.orders"
        names["app"].close()
