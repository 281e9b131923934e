"""The URLs of the shop's page, of its buttons and of its events."""

from django.urls import path

from . import actions
from .views import action, page, raw_sql, watch

urlpatterns = [
    path("", page),
    path("activity", watch),
    path("add", action("ORM", actions.add)),
    path("pay/<int:order>", action("ORM", actions.pay)),
    path("delete/<int:order>", action("ORM", actions.delete)),
    path("more/<int:line>", action("ORM", actions.more)),
    path("less/<int:line>", action("ORM", actions.less)),
    path("pay-all", action("Bulk update", actions.pay_all)),
    path("sql/<slug:name>", action("Raw SQL", raw_sql)),
]
