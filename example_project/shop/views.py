"""The shop's page: its orders and, live, each commit with the handlers that it reached."""

import re

from django.conf import settings
from django.http import Http404, StreamingHttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_POST

from . import actions, activity, lanes
from .models import AuditEntry, Order, Receipt, SearchEntry

# Load nothing from other sites, and allow no site to frame the page.
POLICY = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"


@require_GET
def page(request):
    orders = Order.objects.select_related("customer").prefetch_related("lines__product")
    context = {
        "orders": orders.order_by("-pk")[:20],
        "open": Order.objects.filter(status="open").count(),
        "audit": AuditEntry.objects.order_by("-pk")[:8],
        "receipts": Receipt.objects.order_by("-pk")[:8],
        "entries": SearchEntry.objects.order_by("pk")[:8],
        "sql": [(name, *label_and_sql) for name, label_and_sql in actions.SQL.items()],
        "live": activity.redis() is not None,
        "lanes": lanes.waiting(),
        "psql": settings.PSQL,
    }
    response = render(request, "shop/page.html", context)
    response["Content-Security-Policy"] = POLICY
    response["Cache-Control"] = "no-store"
    return response


def action(origin, act):
    """Return a view that changes data and then shows the page again."""

    @require_POST
    def view(request, **arguments):
        with activity.written_by(origin):
            act(**arguments)
        return redirect("/")

    return view


def raw_sql(name):
    if name not in actions.SQL:
        raise Http404
    actions.run_sql(name)


@require_GET
def watch(request):
    """Send events to the browser, from the last one it received (`Last-Event-ID`)."""
    last = request.headers.get("Last-Event-ID") or request.GET.get("after", "")
    after = last if re.fullmatch(r"\d{1,20}-\d{1,20}", last) else None
    response = StreamingHttpResponse(_stream(after), content_type="text/event-stream")
    response["Cache-Control"] = "no-store"
    response["X-Accel-Buffering"] = "no"
    return response


def _stream(after):
    """Yield server-sent events until the browser or Redis is gone; the browser reconnects."""
    from redis import RedisError

    yield "retry: 1000\n\n"
    try:
        for id, event in activity.events(after):
            yield f"id: {id}\ndata: {event}\n\n" if id else ": still here\n\n"
    except RedisError:
        yield "event: trouble\ndata: Redis does not answer\n\n"
