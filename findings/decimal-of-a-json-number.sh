#!/usr/bin/env bash
# pydantic and msgspec read different Decimals from the same JSON number.
#
# Versions: pydantic 2.14.4, msgspec 0.22.0.
#
# For a field of type Decimal msgspec takes the digits as they are written. pydantic goes
# through a float, also in model_validate_json(), where the digits are still at hand: the
# cents of a large amount are lost without an error, trailing zeros go, and a number above
# 1.8e308 is refused. As JSON strings the amounts are equal.
#
# Output:
#> {"total": 12345678901234567.89}
#>   msgspec  12345678901234567.89
#>   pydantic 12345678901234568
#> {"total": 0.1000000000000000055}
#>   msgspec  0.1000000000000000055
#>   pydantic 0.1
#> {"total": 1.10}
#>   msgspec  1.10
#>   pydantic 1.1
#> {"total": 1e400}
#>   msgspec  1E+400
#>   pydantic finite_number
#> {"total": "12345678901234567.89"}
#>   msgspec  12345678901234567.89
#>   pydantic 12345678901234567.89

set -euo pipefail
umask 022
[ -n "${DEADLINE:-}" ] || exec env DEADLINE=1 timeout --kill-after=10 420 bash "$0"
lab=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$lab"' EXIT
sed -n 's/^#> \{0,1\}//p' "$0" >"$lab/expected"
cd "$lab"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check pydantic==2.14.4 msgspec==0.22.0
venv/bin/python - <<'EOF' | tee output
from decimal import Decimal

import msgspec
import pydantic


class Model(pydantic.BaseModel):
    total: Decimal


class Struct(msgspec.Struct):
    total: Decimal


for number in ("12345678901234567.89", "0.1000000000000000055", "1.10", "1e400", '"12345678901234567.89"'):
    text = f'{{"total": {number}}}'
    print(text)
    print("  msgspec ", msgspec.json.decode(text, type=Struct).total)
    try:
        print("  pydantic", Model.model_validate_json(text).total)
    except pydantic.ValidationError as error:
        print("  pydantic", error.errors()[0]["type"])
EOF
diff expected output
