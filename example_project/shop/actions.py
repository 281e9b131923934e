"""The actions of the page's buttons; together they show all ways to change data."""

from decimal import Decimal

from django.db import connection, transaction
from django.shortcuts import get_object_or_404

from .models import Customer, Order, OrderLine, Product

CUSTOMERS = ("Ada", "Grace", "Alan", "Edsger", "Barbara")
PRODUCTS = (("Tea", "4.50"), ("Cup", "9.00"), ("Pot", "24.00"), ("Honey", "6.20"))

#: The raw SQL that the page offers, by name: the button's label and the statement.
SQL = {
    "prices": (
        "Raise prices",
        "UPDATE shop_product SET price = round(price * 1.1, 2)",
    ),
    "names": (
        "Rename products",
        "UPDATE shop_product SET name = CASE WHEN name LIKE '% (new)'"
        " THEN left(name, -6) ELSE name || ' (new)' END",
    ),
    "often": (
        "Change often",
        "DO 'BEGIN FOR n IN 1..20 LOOP UPDATE shop_orderline SET quantity = n % 4 + 1"
        " WHERE order_id IN (SELECT id FROM shop_order ORDER BY id DESC LIMIT 3);"
        " END LOOP; END'",
    ),
    "nothing": (
        "Change nothing",
        "UPDATE shop_orderline SET quantity = quantity",
    ),
}


@transaction.atomic
def add():
    """Add an order of two products."""
    number = Order.objects.count()
    name = CUSTOMERS[number % len(CUSTOMERS)]
    customer, _ = Customer.objects.get_or_create(
        name=name, defaults={"email": f"{name.lower()}@example.com"}
    )
    order = Order.objects.create(customer=customer)
    for position in (number, number + 1):
        name, price = PRODUCTS[position % len(PRODUCTS)]
        product = Product.objects.filter(name__startswith=name).first()
        product = product or Product.objects.create(name=name, price=Decimal(price))
        OrderLine.objects.create(
            order=order, product=product, quantity=1 + position % 2, price=product.price
        )


def pay(order):
    order = get_object_or_404(Order, pk=order)
    order.status = "paid"
    order.save(update_fields=["status"])


def delete(order):
    """Delete an order and, by Django's cascade, its lines."""
    get_object_or_404(Order, pk=order).delete()


def more(line):
    line = get_object_or_404(OrderLine, pk=line)
    line.quantity += 1
    line.save(update_fields=["quantity"])


def less(line):
    line = get_object_or_404(OrderLine, pk=line)
    if line.quantity > 1:
        line.quantity -= 1
        line.save(update_fields=["quantity"])
    else:
        line.delete()


def pay_all():
    """Pay all open orders without `save()`, so that Django sends no signal."""
    Order.objects.filter(status="open").update(status="paid")


def run_sql(name):
    with connection.cursor() as cursor:
        cursor.execute(SQL[name][1])
