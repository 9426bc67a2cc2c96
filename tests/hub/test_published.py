"""Prepared datasets on the Hub: what is pushed is what training reads, and what changed on the way is refused."""

import shutil

import pytest
from huggingface_hub import constants

from gpt2repro.data import prepare
from gpt2repro.data.shards import check_contents, open_dataset
from gpt2repro.data.training_data import open_data, open_recipe_dataset
from gpt2repro.recipe import Recipe
from gpt2repro.train.launch import start_accelerator
from tests.conftest import TINY

ADDRESS = "hf://datasets/me/python-docs"
PREPARE = ["--source", "python-docs", "--tokenizer", "train:512", "--push", "me/python-docs", "--out"]


@pytest.fixture
def pushed(hub, tiny_dataset, tmp_path, capsys, monkeypatch):
    """The tiny dataset, prepared before, pushed by the command."""
    # read when huggingface_hub was imported
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    address = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    folder = shutil.copytree(tiny_dataset, tmp_path / "python-docs")
    assert prepare.main([*PREPARE, str(folder)]) == 0
    assert f"dataset_dir: {ADDRESS}" in capsys.readouterr().out
    return folder


def test_training_reads_what_was_pushed_and_only_downloads_it_once(hub, pushed):
    assert hub.private == {"me/python-docs": True} and len(hub.commits) == 1
    recipe = Recipe(**{**TINY, "dataset_dir": (ADDRESS,), "source": "python-docs", "tokenizer": "train:512"})
    there, here = open_recipe_dataset(recipe), open_dataset(pushed)
    assert there.fingerprint == here.fingerprint
    assert all((there.split(name).read(0, 999) == here.split(name).read(0, 999)).all() for name in ("train", "val"))
    hub.requests.clear()
    data = open_data(recipe, start_accelerator(recipe))
    assert data.loader.stream.tokens == here.split("train").tokens
    assert not [path for method, path in hub.requests if method == "GET" and path.endswith(".npy")]
    hub.trouble = lambda method, path: 503
    assert open_dataset(f"{ADDRESS}").fingerprint == here.fingerprint


def test_a_shard_that_changed_on_the_hub_is_refused(hub, pushed):
    content = bytearray(hub.files["me/python-docs"]["train-00000.npy"])
    content[5000] ^= 1
    hub.files["me/python-docs"]["train-00000.npy"] = bytes(content)
    with pytest.raises(ValueError, match=r"train-00000.npy has the sha256"):
        check_contents(open_dataset(ADDRESS))


def test_a_download_that_cannot_be_is_one_error_with_the_command(hub, pushed):
    command = "hf download me/other --repo-type dataset --revision v1"
    with pytest.raises(ValueError, match=rf"cannot be downloaded .*{command}"):
        open_dataset("hf://datasets/me/other@v1")
    for name in ("hf://me/python-docs", "hf://datasets/python-docs", "hf://datasets/a/b/c"):
        with pytest.raises(ValueError, match=r"no dataset.s address: give hf://datasets/OWNER/NAME"):
            open_dataset(name)


def test_nothing_is_prepared_for_a_repository_that_cannot_be_written(hub, tmp_path, capsys):
    words = ["other/name" if word == "me/python-docs" else word for word in PREPARE]
    assert prepare.main([*words, str(tmp_path / "out")]) == 1
    assert "the Hub does not let us write to 'other/name'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
