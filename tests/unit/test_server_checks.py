"""Checks of the server that need none."""

from flash_celery.provisioning.findings import OK, WARNING
from flash_celery.provisioning.server_checks import version_finding


def test_minor_releases_that_lose_rows_or_stop_decoding_are_warnings():
    assert version_finding(170006, "17.6").level == version_finding(140019, "14.19").level == OK
    assert "may not send rows" in version_finding(160008, "16.8").message
    ends = version_finding(150013, "15.13")
    assert ends.level == WARNING
    assert "for ever" in ends.message
    assert "upgrade to 15.14 or later" in ends.message


def test_server_newer_than_the_tested_ones_is_a_warning():
    assert version_finding(180006, "18.6").level == OK
    assert version_finding(190000, "19rc1").level == OK
    newer = version_finding(200000, "20beta1")
    assert newer.level == WARNING
    assert "PostgreSQL 20beta1 is newer than 19" in newer.message
