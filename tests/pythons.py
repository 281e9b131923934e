"""Interpreters of other releases of Python, for the tests that run on several.

`python -m tests.pythons 3.15` prints the path of one.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from tests import debian

CACHE = debian.CACHE / "pythons"


def installed(release):
    """The interpreter of a release that this machine has: this one, of PATH, or pyenv's; or None.

    Args:
        release: As in "3.12".
    """
    if release == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    kept = (Path.home() / ".pyenv" / "versions").glob(f"{release}.*/bin/python")
    for candidate in (shutil.which(f"python{release}"), *sorted(kept)):
        # pyenv's shims are on PATH also where they lead nowhere.
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return str(candidate)
    return None


def unpacked(release):
    """Return Debian's interpreter of a release, unpacked into `CACHE`.

    Raises:
        OSError, subprocess.CalledProcessError: Debian has no such release, or cannot be reached.
    """
    folder = CACHE / release
    programs = folder / "usr" / "bin"
    if not (folder / "done").exists():
        names = [f"python{release}{part}" for part in ("", "-minimal", "-venv")]
        debian.unpack(folder, names, ("python3-pip-whl",))
        debian.wrap(folder, programs)
        # ensurepip looks for pip in a folder of the machine.
        wheels = "/usr/share/python-wheels/"
        library = folder / "usr" / "lib" / f"python{release}"
        for settings in {path.resolve() for path in library.glob("_sysconfigdata*.py")}:
            settings.write_text(settings.read_text().replace(wheels, f"{folder}{wheels}"))
        (folder / "done").touch()
    return str(programs / f"python{release}")


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{installed(sys.argv[1]) or unpacked(sys.argv[1])}\n")
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(str(error))
