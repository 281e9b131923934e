"""docs/howto/kubernetes: manifests that Kubernetes takes, and that ask for what there is."""

import kubernetes_validate
import pytest
import yaml

from example_project.servers import free_port, wait_until
from flash_celery.settings import Settings, http_address
from tests.acceptance.conftest import make_shop, shop  # noqa: F401 - fixtures
from tests.acceptance.steps import http_get

from .conftest import DOCS, Page

FOLDER = DOCS / "howto" / "kubernetes"
PAGE = Page("howto/kubernetes.md")
MANIFESTS = {
    (one["kind"], one["metadata"]["name"]): one
    for path in sorted(FOLDER.glob("*.yaml"))
    for one in yaml.safe_load_all(path.read_text())
}
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("name", sorted(MANIFESTS), ids="-".join)
def test_kubernetes_accepts_the_manifests(name, version):
    kubernetes_validate.validate(MANIFESTS[name], version, strict=True)


def container(name):
    pod = MANIFESTS["Deployment", name]["spec"]["template"]["spec"]
    (found_container,) = pod["containers"]
    return pod, found_container


def test_kubernetes_manifests_are_linked():
    for path in FOLDER.glob("*.yaml"):
        assert f"(kubernetes/{path.name})" in PAGE.text


def test_kubernetes_grace_period_exceeds_the_shutdown_timeout():
    pod, _ = container("flash-replicate")
    assert pod["terminationGracePeriodSeconds"] > Settings().flash_shutdown_timeout + 1


def test_kubernetes_budgets_and_selectors_match_their_pods():
    for (kind, name), manifest in MANIFESTS.items():
        if kind == "PodDisruptionBudget":
            pod = MANIFESTS["Deployment", name]["spec"]["template"]["metadata"]
            assert manifest["spec"]["selector"]["matchLabels"] == pod["labels"]


def test_kubernetes_secret_and_manifest_configure_the_app(monkeypatch, new_app):
    _, spec = container("flash-replicate")
    given = {variable["name"]: variable["value"] for variable in spec["env"]}
    environment = MANIFESTS["Secret", "shop"]["stringData"] | given
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    names = {"__name__": "shop"}
    exec(compile(PAGE.files["shop.py"], "shop.py", "exec"), names)
    settings = Settings.from_app(names["app"])
    assert settings.flash_dsn == environment["DSN"]
    assert settings.flash_http == environment["FLASH_HTTP"]
    names["app"].close()


def test_kubernetes_probes_use_the_address_of_the_worker():
    _, spec = container("flash-replicate")
    (port,) = spec["ports"]
    (listening,) = [each["value"] for each in spec["env"] if each["name"] == "FLASH_HTTP"]
    # The kubelet and Prometheus ask from outside the pod.
    assert http_address(listening) == ("0.0.0.0", port["containerPort"])
    assert {spec[probe]["httpGet"]["port"] for probe in PROBES} == {port["name"]}
    template = MANIFESTS["Deployment", "flash-replicate"]["spec"]["template"]
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(port["containerPort"])


@pytest.mark.soak  # two replication workers
def test_kubernetes_new_version_that_waits_alters_nothing(shop):  # noqa: F811
    """So that old and new may overlap in a RollingUpdate, and both pass their probes."""
    database = shop.database
    database.execute("CREATE TABLE others (id int PRIMARY KEY)")
    tables = "SELECT tablename FROM pg_publication_tables WHERE pubname LIKE '%_insert'"
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    old = shop.replicate("--http", addresses[0])
    new = shop.replicate("--http", addresses[1], wait=False, SHOP_ALSO="others")
    shop.until_said(new, "waiting until it is free")
    _, spec = container("flash-replicate")
    for address in addresses:
        for path in (spec[probe]["httpGet"]["path"] for probe in PROBES):
            wait_until(lambda: http_get(address, path)[0] == 200, path)  # noqa: B023
    assert database.execute(tables) == [("items",)]
    assert old.poll() is None
    assert shop.end(old) == 0
    shop.until_said(new, "Replicating the slot")
    assert sorted(database.execute(tables)) == [("items",), ("others",)]
    shop.end(new)
