"""Programs of a newer release of Debian, unpacked beside the machine's own packages.

Nothing is installed. apt works on folders of its own, and the programs run with the C library and
the other libraries of that release, which are unpacked with them.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache"
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SUITES = "sid", "experimental"
#: The loader of the C library.
LOADERS = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}
#: apt-cache lists what a package depends on, and nothing else.
ONLY_DEPENDS = [
    f"--no-{kind}"
    for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
]
#: A program finds its files from its own path, so that the wrapper gives its own.
WRAPPER = """#!/bin/sh
exec {libraries}/{loader} --library-path {libraries} --argv0 "$0" {program} "$@"
"""


def unpack(folder, names, others=()):
    """Unpack packages, and the libraries that they depend on, into a folder.

    Args:
        folder: The folder.
        names: The packages.
        others: The beginnings of the names of further packages that are among those dependencies.

    Raises:
        OSError, subprocess.CalledProcessError: Debian has no such package, or cannot be reached.
    """
    if not KEYS.exists():
        raise FileNotFoundError(f"{KEYS} (debian-archive-keyring)")
    apt = _Apt(folder / "apt")
    apt.run("apt-get", "update", "-qq")
    listed = apt.run("apt-cache", "depends", "--recurse", *ONLY_DEPENDS, *names).splitlines()
    needed = {name for name in listed if name.startswith(("lib", "zlib1g", *others))}
    needed = {name for name in needed if "perl" not in name} - set(names)
    apt.run("apt-get", "download", "-qq", *names, *sorted(needed))
    for package in apt.downloads.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    shutil.rmtree(folder / "apt")


def wrap(folder, programs):
    """Have each program in a folder run with the unpacked libraries, unless it is a script."""
    originals = programs.with_name("programs")
    programs.rename(originals)
    programs.mkdir()
    machine = platform.machine()
    libraries = folder / "usr" / "lib" / f"{machine}-linux-gnu"
    for original in originals.iterdir():
        wrapper = programs / original.name
        if original.is_symlink() or original.read_bytes()[:4] != b"\x7fELF":
            original.rename(wrapper)
            continue
        wrapper.write_text(
            WRAPPER.format(libraries=libraries, loader=LOADERS[machine], program=original)
        )
        wrapper.chmod(0o755)


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
