"""A page in Django's admin: sources, lag, handlers, dead letters. Its autodiscovery imports this.

The page needs a model to be listed in the admin, and this one is in a registry of its own: it has
no table, no migration and no content type.
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
    """What the page is listed as."""

    class Meta:
        apps = Apps()
        app_label = "flash_celery"
        managed = False
        verbose_name = verbose_name_plural = "Status and dead letters"


class StatusAdmin(admin.ModelAdmin):
    """The page, for superusers and whoever has `flash_celery.view_status`.

    Sending dead letters back needs `flash_celery.change_status`.
    """

    def get_urls(self) -> list[Any]:
        """The page, and where its form goes."""
        view = self.admin_site.admin_view
        name = "flash_celery_status"
        return [
            path("", view(require_GET(self.changelist_view)), name=f"{name}_changelist"),
            path("retry/", view(require_POST(self.retry_view)), name=f"{name}_retry"),
        ]

    def has_add_permission(self, request: Any) -> bool:
        """There is nothing to add."""
        return False

    def has_delete_permission(self, request: Any, obj: Any = None) -> bool:
        """There is nothing to delete."""
        return False

    def changelist_view(self, request: Any, extra_context: Any = None) -> Any:
        """The page. What cannot be asked is said on it."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        request.current_app = self.admin_site.name
        context = {
            **self.admin_site.each_context(request),
            "title": "flash-celery",
            "opts": self.opts,
            "may_retry": self.has_change_permission(request),
            "shown": overview.SHOWN,
            **(extra_context or {}),
        }
        try:
            app = project.celery_app()
            context["sources"] = overview.sources(app)
            # A broker that does not answer is not asked once more.
            if not any(source.get("broker_error") for source in context["sources"]):
                context["dead"] = overview.dead_letters(app)
        except FlashError as error:
            context["error"] = str(error)
        return TemplateResponse(request, "flash_celery/status.html", context)

    def retry_view(self, request: Any) -> Any:
        """Send the chosen dead letters back to their handlers."""
        if not self.has_change_permission(request):
            raise PermissionDenied
        names = set(request.POST.getlist("one") or request.POST.getlist("letter"))
        try:
            sent, gone = overview.retry(project.celery_app(), names) if names else (0, 0)
        except FlashError as error:
            self.message_user(request, str(error), messages.ERROR)
        else:
            said = f"{sent} sent back to their handlers" if names else "No letter is chosen"
            more = f"; {gone} were there no more" if gone else ""
            level = messages.SUCCESS if sent else messages.WARNING
            self.message_user(request, f"{said}{more}.", level)
            _logger.info("%s sent %d dead letters back", request.user.pk, sent)
        page = "admin:flash_celery_status_changelist"
        return redirect(reverse(page, current_app=self.admin_site.name))


def register(site: Any) -> None:
    """Put the page into an admin site; the default one has it."""
    site.register(Status, StatusAdmin)


register(admin.site)
