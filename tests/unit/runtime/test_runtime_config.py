"""Settings: precedence, unknown keys and bad values by source."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.runtime.config import ConfigError, ServiceSettings, Settings, load_settings, validate


class Core(Settings):
    policy: str = "lemix"
    limit: int = 10


class Example(ServiceSettings):
    redis_url: str = "redis://default"
    lease_s: float = 5.0
    core: Core = Core()
    devices: tuple[str, ...] = ("cpu",)


def load(*argv, environment=None):
    return load_settings(Example, "example", argv, environment or {})


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_defaults():
    assert load() == Example()


def test_set_wins_over_the_environment_and_that_over_the_file(file):
    path = file("lease_s: 1\nredis_url: redis://file\ncore: {policy: file, limit: 1}\n")
    environment = {"LEMIX_EXAMPLE_LEASE_S": "2", "LEMIX_EXAMPLE_CORE__POLICY": "environment"}
    settings = load("--config", path, "--set", "lease_s=3", environment=environment)
    assert settings.lease_s == 3.0
    assert settings.core == Core(policy="environment", limit=1)
    assert settings.redis_url == "redis://file"


def test_the_last_set_wins_and_lists_are_yaml():
    settings = load("--set", "core.limit=1", "--set", "core.limit=2", "--set", "devices=[cuda:0, cuda:1]")
    assert settings.core.limit == 2
    assert settings.devices == ("cuda:0", "cuda:1")


def test_a_value_may_hold_an_equals_sign():
    assert load("--set", "redis_url=redis://h/0?x=1").redis_url == "redis://h/0?x=1"


def test_the_shared_redis_url_is_taken_where_there_is_such_a_setting():
    environment = {"LEMIX_REDIS_URL": "redis://shared"}
    assert load(environment=environment).redis_url == "redis://shared"
    assert load_settings(ServiceSettings, "other", [], environment) == ServiceSettings()


def test_another_service_s_environment_is_not_ours():
    assert load(environment={"LEMIX_GATEWAY_LISTEN": "x", "PATH": "/bin"}) == Example()


@pytest.mark.parametrize(
    ("argv", "environment", "message"),
    [
        (["--set", "leese_s=1"], {}, "leese_s: unknown key"),
        (["--set", "core.polici=x"], {}, "core.polici: unknown key"),
        ([], {"LEMIX_EXAMPLE_LEESE_S": "1"}, "leese_s: unknown key"),
        ([], {"LEMIX_EXAMPLE_CORE__POLICI": "x"}, "core.polici: unknown key"),
        (["--set", "lease_s=soon"], {}, "lease_s: Input should be a valid number"),
        (["--set", "lease_s"], {}, "--set lease_s: write KEY=VALUE"),
        (["--set", "lease_s=1", "--set", "lease_s.x=1"], {}, "--set lease_s.x: lease_s is not a group of settings"),
        (["--config", "/nowhere.yaml"], {}, "/nowhere.yaml: No such file"),
    ],
)
def test_a_mistake_is_named_with_its_source(argv, environment, message):
    with pytest.raises(ConfigError) as raised:
        load(*argv, environment=environment)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not YAML"), ("- 1\n", "the top level must be a mapping"), ("leese_s: 1\n", "leese_s: unknown key")],
)
def test_a_bad_file_is_named(file, text, message):
    with pytest.raises(ConfigError, match=message):
        load("--config", file(text))


def test_an_empty_file_changes_nothing(file):
    assert load("--config", file("# nothing\n")) == Example()


def test_every_mistake_is_listed_at_once():
    with pytest.raises(ConfigError, match=r"(?s)one: unknown key.*two: unknown key"):
        validate(Example, {"one": 1, "two": 2})


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        load().lease_s = 1.0


@given(text=st.text(st.characters(blacklist_categories=["Cs"]), max_size=40))
def test_whatever_an_operator_types_is_a_value_or_a_config_error(text):
    try:
        settings = load("--set", f"redis_url={text}")
    except ConfigError:
        return
    assert isinstance(settings.redis_url, str)
