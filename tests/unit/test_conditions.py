import datetime

import pytest

from flash_celery.conditions import parse
from flash_celery.errors import SubscriptionError

TYPES = {"id": 20, "total": 1700, "status": 25, "paid": 16, "day": 1082}
ROW = {"id": b"7", "total": b"100.00", "status": b"Paid", "paid": b"t", "day": b"2024-02-29"}


def matches(where, **cells):
    condition = parse(where)
    return condition.bind(TYPES)({**ROW, **cells}.get)


@pytest.mark.parametrize(
    ("where", "verdict"),
    [
        ({"id": 7}, True),
        ({"id": 7.0}, True),
        ({"id": "7"}, True),
        ({"total": 100}, True),
        ({"total__gte": 100, "status": "Paid"}, True),
        ({"total__gte": 100, "status": "paid"}, False),
        ([{"status": "paid"}, {"total__lt": 101}], True),
        ({"id__in": [1, 7]}, True),
        ({"id__not_in": [1, None]}, False),
        ({"id__between": (7, 9)}, True),
        ({"paid": True}, True),
        ({"day__gt": datetime.date(2024, 2, 28)}, True),
        ({"day__lt": "2024-03-01"}, True),
        ({"status__startswith": "Pa"}, True),
        ({"status__icontains": "PAI"}, True),
        ({"status__regex": "^P.*d$"}, True),
        ({"status__isnull": False}, True),
        ({"status": None}, False),
    ],
)
def test_values_compare_as_the_columns_type(where, verdict):
    assert matches(where) is verdict


@pytest.mark.parametrize("lookup", ["id", "id__ne", "id__lt", "id__gte"])
def test_a_comparison_with_null_is_not_a_match(lookup):
    assert matches({lookup: 7}, id=None) is False


def test_null_is_asked_for_by_name():
    assert matches({"status": None}, status=None)
    assert matches({"status__ne": None})


@pytest.mark.parametrize(
    "where", [{"id": "seven"}, {"paid": 7}, {"total": "much"}, {"id__startswith": "7"}]
)
def test_a_value_of_another_type_is_refused_and_never_just_false(where):
    with pytest.raises(SubscriptionError):
        matches(where)
