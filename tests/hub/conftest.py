"""A Hub on loopback in the place of the real one."""

import pytest
from huggingface_hub import constants

from tests.hub.stub_hub import StubHub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stub that this process and its children take for the Hub."""
    with StubHub() as hub:
        for name, value in {**hub.env, "HF_HOME": str(tmp_path / "hf")}.items():
            monkeypatch.setenv(name, value)
        for name, value in hub.constants.items():  # read when huggingface_hub was imported
            monkeypatch.setattr(constants, name, value)
        yield hub
