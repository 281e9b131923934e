"""`manage.py flash`, called from Python."""

import pytest
from django.core.management import CommandError, call_command


def test_call_command_raises_on_failure(configured, app, capsys):
    with pytest.raises(CommandError, match=r"^flash status has failed\.$") as raised:
        call_command("flash", "status")
    assert raised.value.returncode == 2
    assert "flash_dsn is not set" in capsys.readouterr().err


def test_call_command_returns_nothing_on_success(migrated, app, capsys):
    assert call_command("flash", "reset", "--yes") is None
    assert "Nothing to reset" in capsys.readouterr().out
