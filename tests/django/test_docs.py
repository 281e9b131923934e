"""docs/django.md: its examples run, and its table of checks is complete."""

import re

import pytest
from django.core.management import call_command

from flash_celery.handlers.app_subscriptions import subscriptions_of

from .conftest import ROOT

TEXT = (ROOT / "docs" / "django.md").read_text()


@pytest.fixture
def examples(configured):
    return re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_django_page_handler_is_declared(examples, app):
    from sales.models import Order

    names = {"Order": Order, "__name__": "documented"}
    exec(examples[0], names)
    (subscription,) = subscriptions_of(app)
    assert str(subscription.table) == "sales.orders"
    assert subscription.fields == ("customer_id", "status")


def test_django_page_permissions_open_the_admin_page(examples, migrated):
    call_command("migrate", verbosity=0)
    for _ in range(2):  # a second time does no harm
        exec(examples[1], {})
    from django.contrib.auth.models import Group, User

    user = User.objects.create(username="ada", is_staff=True)
    user.groups.add(Group.objects.get(name="on call"))
    assert user.has_perms(["flash_celery.view_status", "flash_celery.change_status"])


def test_django_page_admin_site_has_the_page(examples):
    names = {}
    exec(examples[2], names)
    (model,) = names["site"]._registry
    assert model._meta.label == "flash_celery.Status"
    assert len(examples) == 3


def test_django_checks_are_documented():
    source = (ROOT / "flash_celery" / "django" / "checks.py").read_text()
    written = set(re.findall(r"flash_celery\.[EW]\d+", source))
    assert set(re.findall(r"^\| `(flash_celery\.\w+)`", TEXT, re.MULTILINE)) == written
