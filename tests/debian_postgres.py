"""A PostgreSQL that Debian has only in a newer release: unpacked beside the machine's own packages.

`python -m tests.debian_postgres 19` prints the folder of its programs, and `… 18 ip4r` that of
a server with an extension: those of the tests marked `soak` are postgis-3 with postgis-3-scripts,
ip4r (test_extensions.py), repack, squeeze, partman and cron (test_maintenance.py).

Nothing is installed. apt works on folders of its own, and the programs run with the C library and
the other libraries of that release, which are unpacked with them.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache" / "postgres"
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SUITES = "sid", "experimental"
#: The loader of the C library.
LOADERS = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}
#: apt-cache lists what a package depends on, and nothing else.
ONLY_DEPENDS = [
    f"--no-{kind}"
    for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
]
#: PostgreSQL finds its files from its own path, so that the wrapper gives its own.
WRAPPER = """#!/bin/sh
exec {libraries}/{loader} --library-path {libraries} --argv0 "$0" {program} "$@"
"""


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
    if not KEYS.exists():
        raise FileNotFoundError(f"{KEYS} (debian-archive-keyring)")
    apt = _Apt(folder / "apt")
    names = [f"postgresql-{major}", f"postgresql-client-{major}"]
    names += [f"postgresql-{major}-{extension}" for extension in extensions]
    apt.run("apt-get", "update", "-qq")
    listed = apt.run("apt-cache", "depends", "--recurse", *ONLY_DEPENDS, *names).splitlines()
    libraries = {name for name in listed if name.startswith(("lib", "zlib1g"))}
    libraries = {name for name in libraries if "perl" not in name}
    apt.run("apt-get", "download", "-qq", *names, *sorted(libraries))
    for package in apt.downloads.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    shutil.rmtree(folder / "apt")
    _wrap(folder, programs)
    controls = folder / "usr" / "share" / "postgresql" / major / "extension"
    for control in controls.glob("postgis*-3.control"):
        # Installed, the package has this link among Debian's alternatives.
        control.with_name(control.name.replace("-3", "")).symlink_to(control.name)
    (folder / "done").touch()
    return programs


class _Apt:
    """apt with sources, lists and a status of its own."""

    def __init__(self, folder):
        self.downloads = folder / "downloads"
        for each in (self.downloads, folder / "lists" / "partial", folder / "cache"):
            each.mkdir(parents=True, exist_ok=True)
        sources = folder / "sources.list"
        line = "deb [signed-by={}] http://deb.debian.org/debian {} main\n"
        sources.write_text("".join(line.format(KEYS, suite) for suite in SUITES))
        (folder / "status").touch()
        settings = {
            "Dir::Etc::sourcelist": sources,
            "Dir::Etc::sourceparts": "-",
            "Dir::State": folder,
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder / "cache",
            "APT::Sandbox::User": "root",
        }
        self.options = [f"-o{name}={value}" for name, value in settings.items()]

    def run(self, program, *arguments):
        command = [program, *self.options, *arguments]
        environment = {**os.environ, "LC_ALL": "C"}
        done = subprocess.run(
            command,
            cwd=self.downloads,
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=600,
        )
        return done.stdout


def _wrap(folder, programs):
    """Have each program run with the unpacked libraries."""
    originals = programs.with_name("programs")
    programs.rename(originals)
    programs.mkdir()
    machine = platform.machine()
    libraries = folder / "usr" / "lib" / f"{machine}-linux-gnu"
    for original in originals.iterdir():
        wrapper = programs / original.name
        wrapper.write_text(
            WRAPPER.format(libraries=libraries, loader=LOADERS[machine], program=original)
        )
        wrapper.chmod(0o755)


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{unpack(*sys.argv[1:])}\n")
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(str(error))
