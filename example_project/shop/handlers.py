"""The shop's handlers: they run whenever its data changes, no matter how."""

from celery import shared_task
from django.core.cache import cache
from django.core.mail import send_mail
from django.db import transaction

from flash_celery import Changes, Delete, Insert, Update, on_change, transactional

from .models import AuditEntry, Customer, Order, OrderLine, Product, Receipt, SearchEntry


@on_change(Product, "update|delete")
@shared_task
def forget_product(change):
    """Invalidate the cache of a product. Doing it twice does no harm."""
    cache.delete(f"product:{change.key['id']}")


@on_change(
    OrderLine,
    "insert|update|delete",
    fields=["order", "quantity", "price"],
    ordered="order_id",
)
@shared_task
def keep_total(change):
    """Keep an order's total.

    It is computed from all lines, so running twice does no harm. Two at once would: the one that
    read the lines first could write last. So the changes of one order are handled in sequence.
    """
    match change:
        case Insert(new):
            orders = {new["order_id"]}
        case Delete(old):
            orders = {old["order_id"]}
        case Update(old, new):
            orders = {old["order_id"], new["order_id"]}
    for order in Order.objects.filter(pk__in=orders):
        total = sum(line.quantity * line.price for line in order.lines.all())
        # Write only a total that differs: this UPDATE makes other handlers run.
        Order.objects.filter(pk=order.pk).exclude(total=total).update(total=total)


@on_change(Order)
@on_change(Customer)
@shared_task
def audit(change):
    """Record every change once: `change.id` is the same if the change is delivered again."""
    changed = change.changed
    AuditEntry.objects.get_or_create(
        change_id=change.id,
        table=change.table,
        defaults={
            "operation": change.operation.names()[0],
            "key": dict(change.key),
            "changed": None if changed is None else sorted(changed),
            "committed_at": change.committed_at,
        },
    )


@on_change(Order, "insert", where={"status": "paid"})
@shared_task
def send_receipt(change):
    """Note a receipt when an order becomes paid: a row that starts to match is an `Insert`.

    The commit of that row enqueues the mail. So no receipt is noted without a mail, and no mail is
    sent for a receipt that was rolled back.
    """
    order = change.new
    with transaction.atomic():
        _, first_time = Receipt.objects.get_or_create(order_id=order["id"])
        if first_time:
            customer = Customer.objects.get(pk=order["customer_id"])
            text = f"You paid {order['total']} for order {order['id']}."
            with transactional():
                mail_receipt.delay(customer.email, text)


@shared_task(queue="flash", autoretry_for=(OSError,), retry_backoff=True, max_retries=5)
def mail_receipt(address, text):
    """Mail a receipt."""
    send_mail("Your receipt", text, "shop@example.com", [address])


@on_change(Product, "insert|update|delete", fields=["name"], batch=100)
@shared_task
def index_products(changes: Changes):
    """Update the search index for many products at a time; the last change of each product wins."""
    latest = {change.key["id"]: change for change in changes}
    deleted = [key for key, change in latest.items() if isinstance(change, Delete)]
    SearchEntry.objects.filter(product_id__in=deleted).delete()
    SearchEntry.objects.bulk_create(
        [
            SearchEntry(product_id=key, words=change.new["name"].lower())
            for key, change in latest.items()
            if not isinstance(change, Delete)
        ],
        update_conflicts=True,
        unique_fields=["product_id"],
        update_fields=["words"],
    )
