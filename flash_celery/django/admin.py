"""A page in Django's admin: sources, lag, handlers and dead letters.

Django's autodiscovery imports this module. The admin lists only models, so the page has one. It is
in a registry of its own: it has no table, no migration and no content type.
"""

from __future__ import annotations

import logging
from typing import Any

from django.apps.registry import Apps
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db import models
from django.shortcuts import redirect
from django.template.response import TemplateResponse
from django.urls import path, reverse
from django.views.decorators.http import require_GET, require_POST

from ..errors import FlashError
from . import overview, project

_logger = logging.getLogger(__name__)


class Status(models.Model):
    """The model for which the admin lists the page."""

    class Meta:
        apps = Apps()
        app_label = "flash_celery"
        managed = False
        verbose_name = verbose_name_plural = "Status and dead letters"


class StatusAdmin(admin.ModelAdmin):
    """The page, for superusers and users with the permission `flash_celery.view_status`.

    Retrying dead letters takes the permission `flash_celery.change_status`.
    """

    def get_urls(self) -> list[Any]:
        """Return the URLs of the page and of its form."""
        view = self.admin_site.admin_view
        name = "flash_celery_status"
        return [
            path("", view(require_GET(self.changelist_view)), name=f"{name}_changelist"),
            path("retry/", view(require_POST(self.retry_view)), name=f"{name}_retry"),
        ]

    def has_add_permission(self, request: Any) -> bool:
        """Return False: there is nothing to add."""
        return False

    def has_delete_permission(self, request: Any, obj: Any = None) -> bool:
        """Return False: there is nothing to delete."""
        return False

    def changelist_view(self, request: Any, extra_context: Any = None) -> Any:
        """Render the page. If PostgreSQL or the broker is down, the page shows the error."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        request.current_app = self.admin_site.name
        context = {
            **self.admin_site.each_context(request),
            "title": "flash-celery",
            "opts": self.opts,
            "may_retry": self.has_change_permission(request),
            "max_shown": overview.MAX_SHOWN,
            **(extra_context or {}),
        }
        try:
            app = project.celery_app()
            context["sources"] = overview.sources(app)
            # Do not wait a second time for a broker that has not answered.
            if not any(source.get("broker_error") for source in context["sources"]):
                context["dead"] = overview.dead_letters(app)
        except FlashError as error:
            context["error"] = str(error)
        return TemplateResponse(request, "flash_celery/status.html", context)

    def retry_view(self, request: Any) -> Any:
        """Send the selected dead letters back to their handlers."""
        if not self.has_change_permission(request):
            raise PermissionDenied
        names = set(request.POST.getlist("one") or request.POST.getlist("letter"))
        try:
            sent, gone = overview.retry(project.celery_app(), names) if names else (0, 0)
        except FlashError as error:
            self.message_user(request, str(error), messages.ERROR)
        else:
            text = f"{sent} sent back to their handlers" if names else "No dead letter is selected"
            if gone:
                text += f"; {gone} no longer in the queue"
            level = messages.SUCCESS if sent else messages.WARNING
            self.message_user(request, f"{text}.", level)
            _logger.info("%s sent %d dead letters back", request.user.pk, sent)
        page = "admin:flash_celery_status_changelist"
        return redirect(reverse(page, current_app=self.admin_site.name))


def register(site: Any) -> None:
    """Add the page to an admin site; the default site has it already."""
    site.register(Status, StatusAdmin)


register(admin.site)
