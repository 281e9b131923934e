"""Tables of every kind that a Django project has."""

import json
from decimal import Decimal

from django.contrib.postgres.fields import ArrayField
from django.db import models


class Exact(json.JSONDecoder):
    """Numbers as they were written."""

    def __init__(self):
        super().__init__(parse_float=Decimal)


class Celsius(float):
    """What `Temperature` reads."""


class Temperature(models.Field):
    def db_type(self, connection):
        return "double precision"

    def from_db_value(self, value, expression, connection):
        return None if value is None else Celsius(value)


class Stamped(models.Model):
    """Abstract: its children have its fields."""

    created = models.DateTimeField(null=True)

    class Meta:
        abstract = True


class Customer(Stamped):
    name = models.CharField(max_length=100, db_column="full_name")


class Order(Stamped):
    customer = models.ForeignKey(Customer, on_delete=models.CASCADE)
    status = models.TextField(default="open")
    total = models.DecimalField(max_digits=12, decimal_places=2, default=0)
    note = models.TextField(null=True)
    details = models.JSONField(null=True, decoder=Exact)
    address = models.GenericIPAddressField(null=True)
    tags = ArrayField(models.TextField(), null=True)
    warmth = Temperature(null=True)

    class Meta:
        db_table = '"sales"."orders"'


class UrgentOrder(Order):
    class Meta:
        proxy = True


class Item(models.Model):
    title = models.TextField()
    buyers = models.ManyToManyField(Customer)


class Book(Item):
    """Has a table of its own, with `pages` and a pointer to the item."""

    pages = models.IntegerField()
