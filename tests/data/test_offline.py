import socket

import datasets
import pytest
from huggingface_hub import constants

from nexus_ds.data.corpora import open_source
from nexus_ds.data.offline import stay_offline
from nexus_ds.data.sentence_encoder import encoder_directory
from nexus_ds.errors import ConfigError, DataError


@pytest.fixture
def online_before(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The libraries as somebody imported them before, with the network on."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return monkeypatch


def test_nothing_is_asked_of_the_network(online_before: pytest.MonkeyPatch):
    asked: list[object] = []

    def refuse(*arguments: object, **options: object) -> None:
        asked.append(arguments)
        raise OSError("no network")

    online_before.setattr(socket, "getaddrinfo", refuse)
    online_before.setattr(socket.socket, "connect", refuse)
    with pytest.raises(DataError, match="can't be opened"):
        open_source("hub:nobody/nothing-here")
    with pytest.raises(ConfigError, match="no sentence encoder"):
        encoder_directory("nobody/nothing-here")
    assert asked == []


def test_the_user_may_ask_for_it(online_before: pytest.MonkeyPatch):
    assert stay_offline()
    online_before.setattr(constants, "HF_HUB_OFFLINE", False)
    online_before.setenv("HF_HUB_OFFLINE", "0")
    assert not stay_offline()
    assert constants.HF_HUB_OFFLINE is False
