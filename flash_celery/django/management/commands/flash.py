"""`manage.py flash …`, with the same commands as `celery -A proj flash …`."""

from __future__ import annotations

from argparse import REMAINDER
from types import SimpleNamespace
from typing import Any

from celery import current_app
from django.core.management.base import BaseCommand, CommandError

from flash_celery.cli import flash


class Command(BaseCommand):
    """A command that passes its arguments to the command group of flash-celery."""

    help = "PostgreSQL changes as Celery tasks; `manage.py flash --help` lists the commands."
    requires_system_checks: list[str] = []

    def run_from_argv(self, argv: list[str]) -> None:
        """Let click parse the arguments and print the help."""
        flash.main(argv[2:], prog_name=f"{argv[0]} flash", obj=self._context())

    def handle(self, *args: Any, **options: Any) -> None:
        """Run the command for `call_command("flash", "status")`.

        Raises:
            CommandError: The command has failed.
        """
        code = flash.main(list(args), prog_name="flash", obj=self._context(), standalone_mode=False)
        if code:
            raise CommandError(f"flash {' '.join(args)} has failed.", returncode=code)

    def add_arguments(self, parser: Any) -> None:
        """Accept all arguments; click parses them."""
        parser.add_argument("args", nargs=REMAINDER)

    @staticmethod
    def _context() -> SimpleNamespace:
        return SimpleNamespace(app=current_app._get_current_object())
