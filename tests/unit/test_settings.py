import pickle

import pytest
from celery import Celery

from flash_celery import errors
from flash_celery.settings import Settings


@pytest.fixture
def app():
    app = Celery("shop", set_as_current=False)
    yield app
    app.close()


def test_defaults(app):
    settings = Settings.from_app(app)
    assert settings.flash_replication_slot == "flash_replication"
    assert settings.flash_publication_slot_prefix == "flash_publication"
    assert settings.flash_queue == "flash"


def test_the_users_own_settings_win(app):
    app.conf.flash_queue = "changes"
    assert Settings.from_app(app).flash_queue == "changes"


def test_without_a_dsn_the_sentence_says_where_to_put_it(app):
    with pytest.raises(errors.ConfigurationError, match=r"app\.conf\.flash_dsn = "):
        Settings().require_dsn()


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("flash_qeue", "x", "did you mean flash_queue"),
        ("flash_replica_identity", "full", "'auto' or 'keep'"),
        ("flash_replication_slot", "My-Slot", "a-z, 0-9 and _ only"),
        ("flash_publication_slot_prefix", "p" * 55, "1 to 54 bytes"),
        ("flash_status_interval", 0, "above 0"),
        ("flash_shutdown_timeout", "10", "must be int or float"),
        ("flash_use_streaming", 1, "must be bool"),
        ("flash_queue", "", "flash_queue is empty"),
    ],
)
def test_what_cannot_be_right_is_named(app, name, value, sentence):
    app.conf[name] = value
    with pytest.raises(errors.ConfigurationError, match=sentence):
        Settings.from_app(app)


def test_a_password_does_not_show():
    assert "secret" not in repr(Settings(flash_dsn="postgresql://u:secret@h/d"))


def test_errors_pickle_and_say_what_to_do():
    def tree(error):
        return [error, *(leaf for sub in error.__subclasses__() for leaf in tree(sub))]

    for error in tree(errors.FlashError)[1:]:
        assert pickle.loads(pickle.dumps(error("x"))).args == ("x",)
        assert error.solution
        assert error.__name__ in errors.__doc__
