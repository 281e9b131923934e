#!/usr/bin/env bash
# msgspec refuses a duration that pydantic wrote, from one year on.
#
# Versions: pydantic 2.14.4, msgspec 0.22.0.
#
# Both write a timedelta as an ISO 8601 duration. pydantic splits days into years of 365 days
# (P1Y35D), which msgspec does not read, since a year has no fixed length. A shorter duration
# goes through in both directions, so tests with hours and days do not show it.
#
# Output:
#> 30 days: msgspec writes "P30D", pydantic "P30D"; msgspec reads it: True
#> 364 days: msgspec writes "P364D", pydantic "P364D"; msgspec reads it: True
#> 365 days: msgspec writes "P365D", pydantic "P1Y"; msgspec reads it: Only units 'D', 'H', 'M', and 'S' are supported when parsing ISO8601 durations
#> 400 days: msgspec writes "P400D", pydantic "P1Y35D"; msgspec reads it: Only units 'D', 'H', 'M', and 'S' are supported when parsing ISO8601 durations

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
from datetime import timedelta

import msgspec
import pydantic

adapter = pydantic.TypeAdapter(timedelta)
for days in (30, 364, 365, 400):
    value = timedelta(days=days)
    pydantics, msgspecs = adapter.dump_json(value), msgspec.json.encode(value)
    assert adapter.validate_json(msgspecs) == value
    try:
        answer = msgspec.json.decode(pydantics, type=timedelta) == value
    except msgspec.ValidationError as error:
        answer = error
    print(f"{days} days: msgspec writes {msgspecs.decode()}, pydantic {pydantics.decode()}; msgspec reads it: {answer}")
EOF
diff expected output
