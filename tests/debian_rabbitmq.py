"""A RabbitMQ that Debian has only in a newer release.

`python -m tests.debian_rabbitmq` prints the folder of its programs, for FLASH_RABBITMQ.
"""

import re
import subprocess
import sys

from tests import debian

#: The programs, beside those of Erlang.
PROGRAMS = "rabbitmq-server", "rabbitmqctl"


def unpack():
    """Return the folder of `rabbitmq-server`, `rabbitmqctl` and Erlang's programs.

    Raises:
        OSError, subprocess.CalledProcessError: Debian cannot be reached.
    """
    folder = debian.CACHE / "rabbitmq"
    erlang, rabbitmq = (folder / "usr" / "lib" / name for name in ("erlang", "rabbitmq"))
    if not (folder / "done").exists():
        debian.unpack(folder, ["rabbitmq-server"], ["erlang-"])
        (programs,) = erlang.glob("erts-*/bin")
        debian.wrap(folder, programs)
        for script in ("erl", "start"):
            for path in (programs / script, erlang / "bin" / script):
                if path.exists() and not path.is_symlink():
                    text = path.read_text()
                    path.write_text(re.sub("ROOTDIR=/usr/lib/erlang", f"ROOTDIR={erlang}", text))
        for name in PROGRAMS:
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec {rabbitmq}/bin/{name} "$@"\n')
            program.chmod(0o755)
        (folder / "done").touch()
    (programs,) = erlang.glob("erts-*/bin")
    return programs


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{unpack()}\n")
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(str(error))
