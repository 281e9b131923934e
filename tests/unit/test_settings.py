import pickle
from types import SimpleNamespace

import pytest
from celery import Celery

import flash_celery
from flash_celery import errors
from flash_celery.publishing.brokers.base import connection_to
from flash_celery.settings import Settings
from flash_celery.transactional_tasks import signing


@pytest.fixture
def app():
    app = Celery("shop", set_as_current=False)
    yield app
    app.close()


def test_settings_have_defaults(app):
    settings = Settings.from_app(app)
    assert settings.flash_replication_slot == "flash_replication"
    assert settings.flash_publication_slot_prefix == "flash_publication"
    assert settings.flash_queue == "flash"


def test_settings_of_the_user_win(app):
    app.conf.flash_queue = "changes"
    assert Settings.from_app(app).flash_queue == "changes"


def test_missing_dsn_is_explained(app):
    with pytest.raises(errors.ConfigurationError, match=r"app\.conf\.flash_dsn = "):
        Settings().require_dsn()


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("flash_qeue", "x", "did you mean flash_queue"),
        ("flash_replica_identity", "full", "'auto' or 'keep'"),
        ("flash_replication_slot", "My-Slot", "characters a-z, 0-9 and _, not"),
        ("flash_publication_slot_prefix", "p" * 55, "1 to 54 bytes"),
        ("flash_status_interval", 0, "above 0"),
        ("flash_shutdown_timeout", "10", "must be int or float"),
        ("flash_use_streaming", 1, "must be bool"),
        ("flash_queue", "", "flash_queue is empty"),
        ("flash_dead_queue", "flash", "must be a queue of its own"),
        ("flash_max_deaths", 0, "a number above 0"),
        ("flash_on_lost_broker", "retry", "'auto' or 'continue' or 'halt' or"),
        ("flash_on_lost_broker", "refill", "flash_replay_window retains, which is 0"),
        ("flash_max_queue_length", -1, "or 0 for no limit"),
        ("flash_max_change_size", 0, "a number above 0"),
        ("flash_transactional_max_age", 0, "at least 60: the clocks"),
        ("flash_transactional_max_age", float("nan"), "at least 60: the clocks"),
        ("flash_signing_key", 5, "must be str or list or tuple, not int"),
        ("flash_signing_key", ["a secret", 5], "has a key that is no text"),
    ],
)
def test_invalid_settings_are_named(app, name, value, sentence):
    app.conf[name] = value
    with pytest.raises(errors.ConfigurationError, match=sentence):
        Settings.from_app(app)


@pytest.fixture
def given(app):
    """Reads the settings of a module."""

    def read(namespace, **settings):
        app.config_from_object(SimpleNamespace(**settings), namespace=namespace)
        return Settings.from_app(app)

    return read


@pytest.mark.parametrize(
    ("namespace", "key"),
    [(None, "flash_queue"), ("CELERY", "CELERY_FLASH_QUEUE"), ("SHOP", "SHOP_FLASH_QUEUE")],
)
def test_setting_typo_is_found_in_any_namespace(given, namespace, key):
    assert given(namespace, **{key: "changes"}).flash_queue == "changes"
    typo = key.replace("QUEUE", "QEUE").replace("queue", "qeue")
    with pytest.raises(errors.ConfigurationError, match="did you mean flash_queue"):
        given(namespace, **{typo: "changes"})


@pytest.mark.parametrize(
    ("namespace", "key", "right"),
    [
        (None, "FLASH_QUEUE", "flash_queue"),
        (None, "CELERY_FLASH_QUEUE", "flash_queue"),
        ("CELERY", "FLASH_QUEUE", "CELERY_FLASH_QUEUE"),
        ("CELERY", "CELERY_flash_queue", "CELERY_FLASH_QUEUE"),
        ("SHOP", "CELERY_FLASH_QUEUE", "SHOP_FLASH_QUEUE"),
    ],
)
def test_setting_that_celery_ignores_is_refused(given, namespace, key, right):
    message = f"ignores the setting {key}; rename it to {right}"
    with pytest.raises(errors.ConfigurationError, match=message):
        given(namespace, **{key: "changes"})


def test_settings_of_the_project_with_the_prefix_are_ignored(given):
    project = {"FLASH_SALE_HOURS": 3, "CELERY_FLASH_QUEUE": "changes", "FLASH_QUEUE": "sale"}
    assert given("CELERY", **project).flash_queue == "changes"


def test_settings_module_can_import_the_package(given):
    assert given("", flash_celery=flash_celery, flash_queue="changes").flash_queue == "changes"


def test_settings_repr_hides_the_password(app):
    sources = {"billing": {"dsn": "postgresql://u:secret@h/d"}}
    settings = Settings(flash_dsn="postgresql://u:secret@h/d", flash_sources=sources)
    assert "secret" not in repr(settings) + repr(settings.of_source("billing"))
    for sources in (["secret"], {"billing": "secret"}, {"billing": {"dsn": ["secret"]}}):
        app.conf.flash_sources = sources
        with pytest.raises(errors.ConfigurationError) as raised:
            Settings.from_app(app)
        assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://u:one@secret@h/d",
        "postgres://u:one/secret@h/d",
        "postgresql://u:1/se@cret@h/d?sslmode=require",
        "postgresql://u:%secret@h/d",
        "host=h password=one secret dbname=d",
        "secret",
    ],
)
def test_dsn_whose_password_could_be_read_as_host_is_refused_without_it(dsn):
    with pytest.raises(errors.ConfigurationError, match="%40 for an @") as refused:
        Settings(flash_dsn=dsn).require_dsn()
    assert "secret" not in str(refused.value)
    assert refused.value.__cause__ is None


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://u:one%40secret@h/d?application_name=a@b",
        "postgresql:///d?host=/run/postgresql",
        "postgresql://h:5432,g:5433/d",
        "host=@abstract dbname=d password='a@b'",
    ],
)
def test_dsn_that_libpq_reads_correctly_is_accepted(dsn):
    assert Settings(flash_dsn=dsn).require_dsn() == dsn


BILLING = {"dsn": "postgresql://h/billing"}


def test_source_has_its_own_database_slot_and_prefix(app):
    app.conf.flash_queue = "changes"
    app.conf.flash_sources = {
        "billing": BILLING,
        "old_2": {"dsn": "dbname=old", "slot": "old_slot", "prefix": "Old"},
    }
    settings = Settings.from_app(app)
    names = [
        (of.flash_dsn, of.flash_replication_slot, of.flash_publication_slot_prefix, of.flash_queue)
        for of in map(settings.of_source, ("billing", "old_2"))
    ]
    assert names == [
        (BILLING["dsn"], "flash_replication_billing", "flash_publication_billing", "changes"),
        ("dbname=old", "old_slot", "Old", "changes"),
    ]
    assert settings.source == ""
    assert settings.of_source("billing").source == "billing"


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        (["billing"], "flash_sources must be Mapping, not list"),
        ({"Billing": BILLING}, "only a-z, 0-9 and _, not 'Billing'"),
        ({"": BILLING}, "only a-z, 0-9 and _, not ''"),
        ({5: BILLING}, "only a-z, 0-9 and _, not 5"),
        ({"billing": "dbname=billing"}, r"flash_sources\['billing'\] must be a dict such as .*str"),
        ({"billing": {}}, "The source billing has no dsn: set"),
        ({"billing": {"dsn": ""}}, "The source billing has no dsn: set"),
        (
            {"billing": {"dsn": None}},
            r"\['billing'\]\['dsn'\] must be str or a callable, not NoneType",
        ),
        ({"billing": {"dns": "dbname=x"}}, "'billing'.* has no key 'dns'; did you mean dsn"),
        ({"billing": {**BILLING, "queue": "x"}}, "no key 'queue'; known are: dsn, slot, prefix"),
        ({"billing": {**BILLING, "slot": 5}}, r"\['billing'\]\['slot'\] must be str, not int"),
        (
            {"billing": {**BILLING, "slot": "S"}},
            r"\['billing'\]\['slot'\] must have 1 to 63",
        ),
        ({"b" * 50: BILLING}, r"\['slot'\] must have 1 to 63.*not 'flash_replication_bbb"),
        ({"billing": {**BILLING, "prefix": ""}}, r"\['prefix'\] must have 1 to 54 bytes, not ''"),
        ({"billing": {"dsn": "nonsense"}}, r"\['billing'\]\['dsn'\] is not a connection string"),
    ],
)
def test_invalid_source_is_named(app, sources, sentence):
    app.conf.flash_sources = sources
    with pytest.raises(errors.ConfigurationError, match=sentence):
        Settings.from_app(app)


@pytest.mark.parametrize(
    ("dsn", "names", "shared"),
    [
        # Publications are a database's, slots a server's; user and spelling do not matter.
        ("postgresql://me:pw@h/shop", {"slot": "flash_replication"}, "slot"),
        ("postgresql://h/other", {"slot": "flash_replication"}, "slot"),
        ("host=h dbname=shop port=5432", {"prefix": "flash_publication"}, "prefix"),
        ("postgresql://h/other", {"prefix": "flash_publication"}, None),
        ("postgresql://h:5433/shop", {"slot": "flash_replication"}, None),
        ("postgresql://elsewhere/shop", {"slot": "flash_replication"}, None),
        ("postgresql://h/shop", {}, None),
    ],
)
def test_sources_do_not_share_a_slot_or_publications(app, dsn, names, shared):
    app.conf.flash_dsn = "postgresql://h/shop"
    app.conf.flash_sources = {"billing": {"dsn": dsn, **names}}
    if shared is None:
        Settings.from_app(app)
        return
    sentence = rf"flash_\w+ and flash_sources\['billing'\]\['{shared}'\] are both 'flash_\w+'"
    with pytest.raises(errors.ConfigurationError, match=sentence):
        Settings.from_app(app)


def test_sources_with_names_are_compared_too(app):
    app.conf.flash_sources = {"a": {**BILLING, "slot": "s"}, "b": {**BILLING, "slot": "s"}}
    with pytest.raises(errors.ConfigurationError, match=r"\['a'\]\['slot'\] and .*\['b'\]"):
        Settings.from_app(app)


def test_unknown_source_gets_a_hint():
    settings = Settings(flash_sources={"billing": BILLING})
    with pytest.raises(errors.ConfigurationError, match="no source 'biling' .*mean billing?"):
        settings.of_source("biling")
    with pytest.raises(errors.ConfigurationError, match="no source '' .*known are: billing"):
        settings.of_source("")
    with pytest.raises(errors.ConfigurationError, match="no source 'x' .*it is empty"):
        Settings().of_source("x")


def test_missing_default_source_names_the_others():
    settings = Settings(flash_sources={"billing": BILLING})
    with pytest.raises(errors.ConfigurationError, match="--source: billing"):
        settings.require_dsn()


def test_errors_pickle_and_have_a_solution():
    def tree(error):
        return [error, *(leaf for sub in error.__subclasses__() for leaf in tree(sub))]

    for error in tree(errors.FlashError)[1:]:
        assert pickle.loads(pickle.dumps(error("x"))).args == ("x",)
        assert error.solution
        assert error.__name__ in errors.__doc__


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("redis://:secret@127.0.0.1/0?protocol=3", "broker_url has the option protocol=, which"),
        ("redis://:se?secret=cret@127.0.0.1/0", "broker_url is not the URL of a broker; write"),
    ],
)
def test_broker_url_with_an_option_that_kombu_does_not_take_is_refused(new_app, url, sentence):
    with pytest.raises(errors.ConfigurationError) as refused:
        connection_to(new_app(broker_url=url))
    assert str(refused.value).startswith(sentence)
    assert "secret" not in str(refused.value)


def test_empty_secret_key_of_django_is_no_signing_key(monkeypatch):
    """Django raises an error where it is read."""
    from django.conf import LazySettings, UserSettingsHolder, global_settings

    settings = LazySettings()
    settings._wrapped = UserSettingsHolder(global_settings)
    monkeypatch.setattr("django.conf.settings", settings)
    assert signing.keys_of(Settings()) == []
