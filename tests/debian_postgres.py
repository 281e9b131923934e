"""A PostgreSQL that Debian has only in a newer release.

`python -m tests.debian_postgres 19` prints the folder of its programs, and `… 18 ip4r` that of
a server with an extension: those of the tests marked `soak` are postgis-3 with postgis-3-scripts,
ip4r (test_extensions.py), repack, squeeze, partman and cron (test_maintenance.py).
"""

import subprocess
import sys

from tests import debian

CACHE = debian.CACHE / "postgres"


def unpack(major, *extensions):
    """Return the folder of `postgres` and `initdb`, unpacked into `CACHE`.

    Args:
        major: The major version.
        extensions: The packages of extensions, without `postgresql-18-`.

    Raises:
        OSError, subprocess.CalledProcessError: Debian has no such server, or cannot be reached.
    """
    folder = CACHE / "-".join([major, *extensions])
    programs = folder / "usr" / "lib" / "postgresql" / major / "bin"
    if (folder / "done").exists():
        return programs
    names = [f"postgresql-{major}", f"postgresql-client-{major}"]
    names += [f"postgresql-{major}-{extension}" for extension in extensions]
    debian.unpack(folder, names)
    debian.wrap(folder, programs)
    controls = folder / "usr" / "share" / "postgresql" / major / "extension"
    for control in controls.glob("postgis*-3.control"):
        # Installed, the package has this link among Debian's alternatives.
        control.with_name(control.name.replace("-3", "")).symlink_to(control.name)
    (folder / "done").touch()
    return programs


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{unpack(*sys.argv[1:])}\n")
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(str(error))
