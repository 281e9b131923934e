"""Orders, and a button that pays one with a bulk update, which sends no Django signal."""

from django.http import HttpResponse
from django.middleware.csrf import get_token
from django.shortcuts import redirect
from django.utils.html import format_html, format_html_join
from django.views.decorators.http import require_POST

from .models import AuditEntry, Order


def orders(request):
    rows = format_html_join(
        "",
        "<tr><td>{}<td>{}<td>{}<td>{}<td><form method=post action=/pay/{}>"
        "<input type=hidden name=csrfmiddlewaretoken value={}><button>Pay</button></form>",
        (
            (order.pk, order.customer.name, order.status, order.total, order.pk, get_token(request))
            for order in Order.objects.select_related("customer").order_by("-pk")[:50]
        ),
    )
    audit = format_html_join(
        "",
        "<li>{} {} {} {}",
        (
            (entry.committed_at, entry.operation, entry.table, entry.key)
            for entry in AuditEntry.objects.order_by("-pk")[:20]
        ),
    )
    page = "<!doctype html><title>Shop</title><h1>Orders</h1><table>{}</table>"
    return HttpResponse(format_html(page + "<h1>Audit</h1><ul>{}</ul>", rows, audit))


@require_POST
def pay(request, order):
    Order.objects.filter(pk=order).update(status="paid")
    return redirect("/")
