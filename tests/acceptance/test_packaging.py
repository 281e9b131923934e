"""Both distributions, each in an environment of its own."""

import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path, PurePosixPath

import pytest

from example_project.servers import wait_until
from tests.conftest import missing

pytestmark = pytest.mark.soak

ROOT = Path(__file__).parents[2]
#: The libraries of the extras, and ours that cannot be imported without them.
OPTIONAL = {
    "asgiref": "flash_celery.django",
    "django": "flash_celery.django",
    "prometheus_client": "flash_celery.monitoring",
    "pytest": "flash_celery.pytest_plugin",
    "redis": "flash_celery.publishing.brokers",
    "rich": "flash_celery.commands.status_watch",
}
SHOP = """
import os
from celery import Celery
from flash_celery import on_change

app = Celery("shop", broker=os.environ.get("SHOP_BROKER"))
app.conf.flash_dsn = "postgresql://shop@127.0.0.1:1/shop"


@on_change("public.orders")
@app.task
def reward(change): ...
"""

IMPORT = """
import importlib, json, pkgutil, flash_celery

refused = {}
for found in pkgutil.walk_packages(flash_celery.__path__, "flash_celery.", lambda name: None):
    try:
        importlib.import_module(found.name)
    except ModuleNotFoundError as error:
        refused[found.name] = error.name.partition(".")[0]
print(json.dumps(refused))
"""


def run(*command, timeout=600, **more):
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=timeout, **more
    )


def done(*command, **more):
    ran = run(*command, **more)
    assert ran.returncode == 0, f"{command}: {ran.stdout}{ran.stderr}"
    return ran.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The folder of both; `make release` has built them already."""
    if "FLASH_DIST" in os.environ:
        return Path(os.environ["FLASH_DIST"])
    folder = tmp_path_factory.mktemp("dist")
    done(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(distributions):
    (wheel_path,) = distributions.glob("*.whl")
    return wheel_path


@pytest.fixture(scope="module")
def source(distributions):
    (source_path,) = distributions.glob("*.tar.gz")
    return source_path


def environment(folder, requirement):
    venv.create(folder, with_pip=True)
    done(folder / "bin" / "pip", "install", "--quiet", requirement)
    return folder / "bin"


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """The programs of an environment in which the wheel was installed without any extra."""
    return environment(tmp_path_factory.mktemp("bare"), wheel)


@pytest.fixture(scope="module")
def with_redis(source, tmp_path_factory):
    """The same for the source distribution with the extra `redis`."""
    folder = tmp_path_factory.mktemp("redis")
    return environment(folder, f"flash-celery[redis] @ {source.as_uri()}")


@pytest.fixture
def project(tmp_path):
    (tmp_path / "shop.py").write_text(SHOP)
    return tmp_path


def tracked(*folders):
    """What git knows of the tree."""
    if not (ROOT / ".git").exists():
        missing("a git checkout")
    names = done("git", "-C", ROOT, "ls-files", *folders).splitlines()
    return {name for name in names if (ROOT / name).exists()}


def test_wheel_contains_only_the_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {name for name in names if not PurePosixPath(name).parts[0].endswith(".dist-info")}
    assert ours == tracked("flash_celery")
    assert {"flash_celery/py.typed", "flash_celery/cli/__init__.py"} <= ours


def test_source_distribution_contains_the_tracked_files(source):
    with tarfile.open(source) as archive:
        files = [member for member in archive if not member.isdir()]
        contents = {
            member.name.partition("/")[2]: archive.extractfile(member).read() for member in files
        }
    made = {"PKG-INFO", "setup.cfg"}
    ours = {name for name in contents if name not in made and "egg-info/" not in name}
    assert ours == tracked()
    assert ours >= {"Makefile", ".ci/run", "tests/conftest.py", "example_project/demo.py"}
    here = f"{ROOT}/".encode()
    assert [name for name, content in contents.items() if here in content] == []


@pytest.fixture
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_description_is_the_readme_without_repository_links(metadata):
    description = metadata.get_payload(decode=True).decode()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "| promise | how |" in description
    assert "The tutorial takes you from" in description
    links = re.findall(r"\]\((.*?)\)", description)
    assert [link for link in links if not link.startswith("https://")] == []
    assert "![" not in description


def test_wheel_has_four_dependencies(metadata):
    needed = [
        requirement
        for requirement in metadata.get_all("Requires-Dist")
        if "extra ==" not in requirement
    ]
    names = {re.match(r"[\w-]+", requirement).group() for requirement in needed}
    assert names - {"typing-extensions"} == {"celery", "kombu", "psycopg", "click"}
    extras = {"redis", "django", "demo", "metrics", "test"}
    assert extras <= set(metadata.get_all("Provides-Extra"))
    assert metadata["License-Expression"] == "MIT"
    assert metadata.get_all("License-File") == ["LICENSE"]


def test_extras_are_imported_only_by_their_modules(bare, tmp_path):
    refused = json.loads(done(bare / "python", "-c", IMPORT, cwd=tmp_path))
    assert "redis" in refused.values()
    for module, library in refused.items():
        assert library in OPTIONAL, f"{module} imports {library}"
        assert module.startswith(OPTIONAL[library]), f"{module} imports {library}"


def test_wheel_types_are_visible(bare, tmp_path):
    snippet = tmp_path / "snippet.py"
    snippet.write_text(
        "from flash_celery import Change, Operation, __version__\n"
        "reveal_type(Operation.INSERT.names())\n"
        "reveal_type(__version__)\n"
        "def handle(change: Change) -> int:\n"
        "    return change.id\n"
    )
    python = bare / "python"
    mypy = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--python-executable"]
    ran = run(*mypy, python, snippet, cwd=tmp_path)
    revealed = re.findall(r'Revealed type is "(.*)"', ran.stdout)
    assert len(revealed) == 2, ran.stdout + ran.stderr
    assert "Any" not in "".join(revealed)
    assert 'got "str", expected "int"' in ran.stdout


def test_version_is_that_of_the_installed_package(bare, wheel, tmp_path):
    output = done(
        bare / "python", "-c", "import flash_celery as f; print(f.__version__)", cwd=tmp_path
    )
    assert f"-{output.strip()}-" in wheel.name


@pytest.mark.parametrize("programs", ["bare", "with_redis"])
def test_commands_belong_to_celery(request, programs, project):
    celery = request.getfixturevalue(programs) / "celery"
    assert "replicate" in done(celery, "flash", "--help", cwd=project)
    assert "replicate" in done(celery, "-A", "shop", "flash", "--help", cwd=project)
    ran = run(celery, "flash", "status", cwd=project)
    assert (ran.returncode, len(ran.stderr.splitlines())) == (2, 1)
    assert "Celery has no app" in ran.stderr


@pytest.mark.parametrize(
    "url", ["redis://h:6379/0", "rediss://h:6379/0", "sentinel://h:26379", "redis+socket:///tmp/r"]
)
@pytest.mark.parametrize(
    "command", [("flash", "replicate"), ("flash", "dead", "list"), ("worker", "-P", "solo")]
)
def test_missing_redis_client_is_named(bare, project, command, url):
    broker = {**os.environ, "SHOP_BROKER": url}
    ran = run(bare / "celery", "-A", "shop", *command, cwd=project, env=broker, timeout=60)
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1:] == [
        "Error: The broker is Redis, and its client is not installed: "
        "pip install 'flash-celery[redis]'."
    ]
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("programs", "any_shop"), [("bare", "rabbitmq"), ("with_redis", "redis")], indirect=["any_shop"]
)
def test_installed_package_delivers_a_change(request, programs, any_shop, database):
    shop = any_shop
    shop.environment.update(PYTHONPATH=str(Path(__file__).parent), SHOP_QUORUM="")
    shop.python = str(request.getfixturevalue(programs) / "python")
    assert shop.run("flash", "doctor").returncode == 0
    worker = shop.worker()
    replicate = shop.replicate()
    database.execute("INSERT INTO items VALUES (1, 'one')")
    (note,) = shop.until_noted(1)
    assert note["new"]["name"] == "one"
    status = shop.run("flash", "status", "--json")
    assert status.returncode == 0, status.stderr
    assert json.loads(status.stdout)["slot"]["name"] == database.slot
    assert shop.end(replicate) == 0
    shop.end(worker)
    wait_until(lambda: worker.poll() is not None, "the worker to end")
