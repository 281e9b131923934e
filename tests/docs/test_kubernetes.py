"""docs/howto/kubernetes: manifests that Kubernetes takes, and that ask for what there is."""

import dataclasses

import kubernetes_validate
import pytest
import yaml

from flash_celery.settings import Settings
from tests.acceptance.conftest import make_shop, shop  # noqa: F401 - fixtures

from .conftest import DOCS, Page

FOLDER = DOCS / "howto" / "kubernetes"
PAGE = Page("howto/kubernetes.md")
MANIFESTS = {
    (one["kind"], one["metadata"]["name"]): one
    for path in sorted(FOLDER.glob("*.yaml"))
    for one in yaml.safe_load_all(path.read_text())
}
KNOWN = {field.name for field in dataclasses.fields(Settings)}


@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("name", sorted(MANIFESTS), ids="-".join)
def test_kubernetes_takes_the_manifests(name, version):
    kubernetes_validate.validate(MANIFESTS[name], version, strict=True)


def container(name):
    pod = MANIFESTS["Deployment", name]["spec"]["template"]["spec"]
    (one,) = pod["containers"]
    return pod, one


def test_every_manifest_is_linked():
    for path in FOLDER.glob("*.yaml"):
        assert f"(kubernetes/{path.name})" in PAGE.text


def test_the_grace_period_is_longer_than_stopping_takes():
    pod, _ = container("flash-replicate")
    assert pod["terminationGracePeriodSeconds"] > Settings().flash_shutdown_timeout + 1


def test_budgets_and_selectors_meet_their_pods():
    for (kind, name), manifest in MANIFESTS.items():
        if kind == "PodDisruptionBudget":
            pod = MANIFESTS["Deployment", name]["spec"]["template"]["metadata"]
            assert manifest["spec"]["selector"]["matchLabels"] == pod["labels"]


def test_the_app_reads_what_the_secret_and_the_manifest_hold(monkeypatch, new_app):
    environment = dict(MANIFESTS["Secret", "shop"]["stringData"])
    _, one = container("flash-replicate")
    environment |= {variable["name"]: variable["value"] for variable in one["env"]}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    names = {"__name__": "shop"}
    exec(compile(PAGE.files["shop.py"], "shop.py", "exec"), names)
    app = names["app"]
    if "flash_http" not in KNOWN:
        del app.conf.changes["flash_http"]
    assert Settings.from_app(app).flash_dsn == environment["DSN"]
    app.close()


@pytest.mark.xfail("flash_http" not in KNOWN, reason="flash_http comes with the metrics")
def test_there_is_something_to_probe():
    assert "flash_http" in KNOWN


@pytest.mark.soak  # two replication workers
def test_a_new_version_that_waits_alters_nothing(shop):  # noqa: F811
    """So that old and new may overlap in a RollingUpdate."""
    database = shop.database
    database.execute("CREATE TABLE others (id int PRIMARY KEY)")
    tables = "SELECT tablename FROM pg_publication_tables WHERE pubname LIKE '%_insert'"
    old = shop.replicate()
    new = shop.replicate(wait=False, SHOP_ALSO="others")
    shop.until_said(new, "waiting until it is free")
    assert database.execute(tables) == [("items",)]
    assert old.poll() is None
    assert shop.end(old) == 0
    shop.until_said(new, "Replicating the slot")
    assert sorted(database.execute(tables)) == [("items",), ("others",)]
    shop.end(new)
