#!/usr/bin/env bash
# A Celery task with pydantic=True passes list[Model] through unvalidated.
#
# Versions: Celery 5.7.0, pydantic 2.14.4.
#
# Celery validates a parameter whose annotation is a model or Optional of one, nothing else. A
# list of models arrives as plain dicts, wrong ones too, and an int or a union of two models as
# whatever was sent, without an error. The script calls the tasks eagerly; a
# worker passed the list and the int the same way.
#
# Output:
#> one({'id': 'not a number'})
#>   FAILURE ValidationError
#> optional({'id': 'not a number'})
#>   FAILURE ValidationError
#> many([{'id': 'not a number'}])
#>   handler got [{'id': 'not a number'}]
#>   SUCCESS NoneType
#> either({'id': 'not a number'})
#>   handler got {'id': 'not a number'}
#>   SUCCESS NoneType
#> number('5 kg')
#>   handler got '5 kg'
#>   SUCCESS NoneType

set -euo pipefail
umask 022
[ -n "${DEADLINE:-}" ] || exec env DEADLINE=1 timeout --kill-after=10 420 bash "$0"
lab=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$lab"' EXIT
sed -n 's/^#> \{0,1\}//p' "$0" >"$lab/expected"
cd "$lab"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check celery==5.7.0 pydantic==2.14.4
venv/bin/python - <<'EOF' | tee output
from celery import Celery
from pydantic import BaseModel


class Order(BaseModel):
    id: int


class Refund(BaseModel):
    order: int


app = Celery()
app.conf.task_always_eager = True
wrong = {"id": "not a number"}


@app.task(pydantic=True)
def one(order: Order): ...


@app.task(pydantic=True)
def optional(order: Order | None = None): ...


@app.task(pydantic=True)
def many(orders: list[Order]):
    print("  handler got", orders)


@app.task(pydantic=True)
def either(event: Order | Refund):
    print("  handler got", event)


@app.task(pydantic=True)
def number(quantity: int):
    print("  handler got", repr(quantity))


for task, argument in ((one, wrong), (optional, wrong), (many, [wrong]), (either, wrong), (number, "5 kg")):
    print(f"{task.__name__.rpartition('.')[2]}({argument!r})")
    result = task.delay(argument)
    print("  " + result.state, type(result.result).__name__)
EOF
diff expected output
