"""The page of the shop: its orders, and live beside them which handlers are told of what."""

import re

from django.conf import settings
from django.http import Http404, StreamingHttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_POST

from . import actions, activity
from .models import AuditEntry, Order, Receipt, SearchEntry

# Nothing from elsewhere, and nobody frames it.
POLICY = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"


@require_GET
def page(request):
    orders = Order.objects.select_related("customer").prefetch_related("lines__product")
    shown = {
        "orders": orders.order_by("-pk")[:20],
        "open": Order.objects.filter(status="open").count(),
        "audit": AuditEntry.objects.order_by("-pk")[:8],
        "receipts": Receipt.objects.order_by("-pk")[:8],
        "entries": SearchEntry.objects.order_by("pk")[:8],
        "sql": [(name, *said) for name, said in actions.SQL.items()],
        "live": activity.redis() is not None,
        "psql": settings.PSQL,
    }
    answer = render(request, "shop/page.html", shown)
    answer["Content-Security-Policy"] = POLICY
    answer["Cache-Control"] = "no-store"
    return answer


def action(origin, act):
    """A view that changes something and shows the page again."""

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
    """Server-sent events, from where the browser was (`Last-Event-ID`)."""
    after = request.headers.get("Last-Event-ID") or request.GET.get("after", "")
    known = after if re.fullmatch(r"\d{1,20}-\d{1,20}", after) else None
    answer = StreamingHttpResponse(_stream(known), content_type="text/event-stream")
    answer["Cache-Control"] = "no-store"
    answer["X-Accel-Buffering"] = "no"
    return answer


def _stream(after):
    """It ends when its reader is gone, which a write shows, or Redis is; the browser comes back."""
    from redis import RedisError

    yield "retry: 1000\n\n"
    try:
        for number, event in activity.events(after):
            yield f"id: {number}\ndata: {event}\n\n" if number else ": still here\n\n"
    except RedisError:
        yield "event: trouble\ndata: Redis does not answer\n\n"
