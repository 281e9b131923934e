"""Create the table of marks."""

from typing import Any

from django.db import migrations

from flash_celery.lanes.marks_table import CREATE_TABLE


class CreateMarks(migrations.RunSQL):
    """Runs SQL in databases of PostgreSQL; the project's others need no marks."""

    def database_forwards(self, app_label: str, schema_editor: Any, *states: Any) -> None:
        """Create the table."""
        if schema_editor.connection.vendor == "postgresql":
            super().database_forwards(app_label, schema_editor, *states)

    def database_backwards(self, app_label: str, schema_editor: Any, *states: Any) -> None:
        """Drop the table."""
        if schema_editor.connection.vendor == "postgresql":
            super().database_backwards(app_label, schema_editor, *states)


class Migration(migrations.Migration):
    """The table."""

    initial = True
    operations = [CreateMarks(CREATE_TABLE, "DROP TABLE flash_celery_marks")]
