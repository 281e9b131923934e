"""The shop's tables."""

from django.db import models


class Customer(models.Model):
    name = models.TextField()
    email = models.EmailField()


class Product(models.Model):
    name = models.TextField()
    price = models.DecimalField(max_digits=12, decimal_places=2)


class Order(models.Model):
    customer = models.ForeignKey(Customer, on_delete=models.CASCADE)
    status = models.TextField(default="open")
    #: Computed by the handler `keep_total`.
    total = models.DecimalField(max_digits=12, decimal_places=2, default=0)


class OrderLine(models.Model):
    order = models.ForeignKey(Order, on_delete=models.CASCADE, related_name="lines")
    product = models.ForeignKey(Product, on_delete=models.PROTECT)
    quantity = models.IntegerField()
    price = models.DecimalField(max_digits=12, decimal_places=2)


class AuditEntry(models.Model):
    """The audit trail: one row for each change of an order or a customer."""

    change_id = models.TextField()
    table = models.TextField()
    operation = models.TextField()
    key = models.JSONField()
    changed = models.JSONField(null=True)
    committed_at = models.DateTimeField()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["change_id", "table"], name="audited_once")]


class Receipt(models.Model):
    """A receipt that was sent; an order has at most one."""

    order_id = models.BigIntegerField(unique=True)
    sent_at = models.DateTimeField(auto_now_add=True)


class SearchEntry(models.Model):
    """The search index of the products."""

    product_id = models.BigIntegerField(primary_key=True)
    words = models.TextField()
