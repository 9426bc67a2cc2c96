"""How to train with every tensor in shards."""

from pathlib import Path

import pytest

from tests.conftest import CONFIGS


@pytest.fixture(scope="session")
def sharded(tmp_path_factory) -> dict:
    """How to start the script on two processes with a half of every tensor each, in the precision of the recipe."""
    config = tmp_path_factory.mktemp("configs") / "fsdp2.yaml"
    config.write_text((CONFIGS / "fsdp2_8gpu.yaml").read_text().replace("mixed_precision: bf16\n", ""))
    return {"processes": 2, "config": config, "script": Path(__file__).with_name("sharded_on_cpu.py")}
