import enum
from dataclasses import dataclass

import pytest
from sqlalchemy import BigInteger, Column, Enum, ForeignKey, Integer, MetaData, Table, Text
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    aliased,
    configure_mappers,
    mapped_column,
    registry,
    relationship,
)
from sqlalchemy.sql import quoted_name

from flash_celery import on_change
from flash_celery.conditions import parsing
from flash_celery.errors import SubscriptionError
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.handlers.subscriptions import column_name, column_names, table_name
from flash_celery.table_name import TableName


class Base(DeclarativeBase): ...


class Order(Base):
    __tablename__ = "orders"
    __table_args__ = {"schema": "sales"}
    id: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str] = mapped_column("order_status", Text)
    order_total: Mapped[int] = mapped_column("total")
    # Not there yet: nothing may configure the mappers while a handler is declared.
    lines: Mapped[list] = relationship("Line")


class Employee(Base):
    __tablename__ = "employees"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    kind: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "employee"}


class Manager(Employee):  # joined-table inheritance
    __tablename__ = "managers"
    id: Mapped[int] = mapped_column("manager_id", ForeignKey("employees.id"), primary_key=True)
    level: Mapped[int] = mapped_column("manager_level")
    __mapper_args__ = {"polymorphic_identity": "manager"}


class Intern(Employee):  # single-table inheritance
    school: Mapped[str | None] = mapped_column("intern_school")
    __mapper_args__ = {"polymorphic_identity": "intern"}


class Abstract(Base):
    __abstract__ = True


class AbstractOrder(Order):
    __abstract__ = True


class Imperative: ...


imperative = Table("Plain orders", MetaData(schema="Old"), Column("Id", Integer, primary_key=True))
registry().map_imperatively(Imperative, imperative, properties={"number": imperative.c.Id})
LINES = Table("lines", MetaData(), Column("id", BigInteger, key="number"), Column("note", Text))


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"


def _values(members):
    return [member.value for member in members]


class Paint(Base):
    __tablename__ = "paints"
    id: Mapped[int] = mapped_column(primary_key=True)
    by_name: Mapped[Colour] = mapped_column(Enum(Colour, native_enum=False))
    by_value: Mapped[Colour] = mapped_column(Enum(Colour, values_callable=_values))
    text: Mapped[str]


def test_sqlalchemy_class_names_its_table():
    assert str(table_name(Order)) == "sales.orders"
    assert str(table_name(Manager)) == "public.managers"
    assert str(table_name(Intern)) == str(table_name(Employee)) == "public.employees"
    assert str(table_name(Imperative)) == 'Old."Plain orders"'
    assert str(table_name(LINES)) == "public.lines"


def test_sqlalchemy_names_are_those_of_the_catalog():
    quoted = Table(quoted_name("Orders", True), MetaData(), schema=quoted_name("Sales", True))
    folded = Table(quoted_name("Orders", False), MetaData())
    assert table_name(quoted) == TableName("Sales", "Orders")
    assert table_name(folded) == TableName("public", "orders")
    # Names are part of what a replication worker is known by.
    assert repr(table_name(quoted)) == repr(TableName("Sales", "Orders"))


def test_sqlalchemy_fields_are_attributes_or_columns():
    assert column_names("fields", ["status", "order_total", "id"], Order) == (
        "order_status",
        "total",
        "id",
    )
    assert column_names("fields", ["order_status", "total"], Order) == ("order_status", "total")
    assert column_names("fields", [Order.status, "nothing"], Order) == ("order_status", "nothing")
    assert column_names("key", ["number"], Imperative) == ("Id",)
    assert column_names("key", [Imperative.number], imperative) == ("Id",)
    assert column_names("key", ["number"], LINES) == column_names("key", [LINES.c.number], LINES)
    assert column_name("number", LINES) == "id"
    assert column_name(Order.status, "sales.orders") == "order_status"
    assert column_name("level", Manager) == "manager_level"
    assert column_name("school", Intern) == column_name(Intern.school, Employee) == "intern_school"
    # An id that both tables have is the own one.
    assert column_name("id", Manager) == column_name(Manager.id, Manager) == "manager_id"


def test_sqlalchemy_attributes_work_in_conditions():
    where = [{"status": "paid", "order_total__gte": 100}, {Order.status: None}, {Order.id: 5}]
    parsed = parsing.parse(where, lambda name: column_name(name, Order))
    shown = [[(lookup.column, lookup.name) for lookup in part] for part in parsed.alternatives]
    assert shown == [
        [("order_status", "eq"), ("total", "gte")],
        [("order_status", "isnull")],
        [("id", "eq")],
    ]


@dataclass
class Unmapped:
    id: int


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (Base, "Base is not mapped to a table"),
        (Abstract, r"Abstract is not mapped to a table \(abstract"),
        (AbstractOrder, "AbstractOrder is not mapped"),
        (Unmapped, "a SQLAlchemy table, not <class"),
        (LINES.alias("other"), "a SQLAlchemy table, not"),
        (aliased(Imperative), "a SQLAlchemy table, not"),
        (LINES.select().subquery(), "a SQLAlchemy table, not"),
    ],
)
def test_sqlalchemy_class_without_a_table_is_refused(table, sentence):
    with pytest.raises(SubscriptionError, match=sentence):
        table_name(table)


def test_sqlalchemy_class_mapped_to_a_join_is_refused():
    class Joined: ...

    registry().map_imperatively(Joined, Employee.__table__.join(Manager.__table__))
    with pytest.raises(SubscriptionError, match="Joined is mapped to a join"):
        table_name(Joined)


@pytest.mark.parametrize(
    ("name", "table", "sentence"),
    [
        (
            "name",
            Manager,
            "name is a column of public.employees, and the handler is on public.mana",
        ),
        (Manager.name, Manager, "is a column of public.employees"),
        (Order.status, Manager, "Order.status is a column of sales.orders"),
        (LINES.c.note, Order, "lines.note is a column of public.lines"),
        (5, Order, "a column's name is a string"),
    ],
)
def test_sqlalchemy_attribute_of_another_table_is_refused(name, table, sentence):
    with pytest.raises(SubscriptionError, match=sentence):
        column_name(name, table)


def test_sqlalchemy_class_has_a_handler(app):
    @on_change(
        Order, fields=[Order.status, "order_total"], where={"status__in": ["paid"]}, key=["id"]
    )
    def handle(change): ...

    @on_change(Base)
    def nowhere(change): ...

    with pytest.raises(SubscriptionError, match=r"nowhere: Base is not mapped"):
        subscriptions_of(app)
    app.tasks[nowhere.name].flash_subscriptions.clear()
    (subscription,) = subscriptions_of(app)
    assert (str(subscription.table), subscription.fields) == (
        "sales.orders",
        ("order_status", "total"),
    )
    assert subscription.columns == {"order_status", "total", "id"}


def test_sqlalchemy_mappers_are_not_configured():
    with pytest.raises(Exception, match="Line"):
        configure_mappers()


def test_sqlalchemy_enum_members_are_compared_as_sqlalchemy_writes_them(new_app):
    app = new_app()

    @on_change(
        Paint,
        where=[
            {Paint.by_name: Colour.RED},
            {"by_name__in": [Colour.RED]},
            {"by_value": Colour.RED},
            {"text": Colour.RED},
            {"by_name": None},
        ],
    )
    @app.task(name="painted")
    def painted(change): ...

    (subscription,) = subscriptions_of(app)
    values = [part[0].value for part in subscription.where.alternatives]
    assert values == ["RED", ("RED",), "r", Colour.RED, True]
