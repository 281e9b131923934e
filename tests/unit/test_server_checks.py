"""Checks of the server that need none."""

from flash_celery.provisioning.findings import OK, WARNING
from flash_celery.provisioning.server_checks import version_finding


def test_server_newer_than_the_tested_ones_is_a_warning():
    assert version_finding(180006, "18.6").level == OK
    assert version_finding(190000, "19rc1").level == OK
    newer = version_finding(200000, "20beta1")
    assert newer.level == WARNING
    assert "PostgreSQL 20beta1 is newer than 19" in newer.message
