"""Publishing: the card, the folder, uploads to a Hub on loopback by the real client, pushes from inside a run."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

import train_accelerate
from eval.multiple_choice import main as score
from eval.validation import main as validate
from gpt2repro.files import seal
from gpt2repro.hub import push
from gpt2repro.hub.convert import convert
from gpt2repro.hub.figures import eval_results, weights_sha256
from gpt2repro.hub.publish import main
from gpt2repro.hub.push import AGAIN, HubPush
from gpt2repro.recipe import Recipe
from tests.conftest import ROOT, train_rows, wait_until
from tests.test_train import assert_same_bits

OURS = {
    "README.md", "config.json", "configuration_gpt2repro.py", "generation_config.json", "model.safetensors",
    "modeling_gpt2repro.py", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
STOCK = {name for name in OURS if not name.endswith(".py")}
TOKENS = torch.randint(512, (2, 32), generator=torch.Generator().manual_seed(1))
RECIPE = Recipe(hub_repo_id="me/model", hub_every=2, max_steps=9)
ITEMS = [{"goal": "To open a file,", "sol1": "call open.", "sol2": "call close.", "label": n % 2} for n in range(6)]


@pytest.fixture
def run(unbroken_run, tmp_path):
    return shutil.copytree(unbroken_run, tmp_path / "run", symlinks=True)


def logits(folder, **kwargs):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, **kwargs)(TOKENS).logits


def refusal(capsys, *arguments) -> str:
    assert main([str(word) for word in arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def card_of(run, tmp_path, *flags) -> ModelCard:
    folder = tmp_path / f"dry-{len(list(tmp_path.iterdir()))}"
    assert main([str(run / "latest"), "--repo-id", "me/model", "--dry-run", str(folder), *flags]) == 0
    return ModelCard.load(folder / "README.md")


def values(card) -> dict:
    return {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results or []}


def test_the_cards_numbers_are_those_in_the_files(train_script, tiny_dataset, tmp_path, monkeypatch):
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    run = tmp_path / "run"
    train_script(run, eval_tasks=f"piqa:4={tmp_path / 'piqa.jsonl'}", max_steps=4)
    (run / "curves.png").write_bytes(b"a picture")
    first = card_of(run, tmp_path)
    val, scored = train_rows(run, "val")[4], train_rows(run, "eval")[4]
    assert values(first) == {
        ("python-docs", "loss"): val["loss"], ("python-docs", "perplexity"): val["perplexity"],
        ("python-docs", "bits_per_byte"): val["bits_per_byte"],
        ("piqa", "acc"): scored["acc"], ("piqa", "acc_norm"): scored["acc_norm"],
    }  # fmt: skip
    # Evaluations of the finished checkpoint take the place of the run's own.
    monkeypatch.chdir(run)
    flags = ["--model", "latest", "--dataset", str(tiny_dataset), "--max-tokens", "4096"]
    validate([*flags, "--output", "v.json"])
    flags = ["--task", "piqa", "--model", str(run / "latest"), "--data", str(tmp_path / "piqa.jsonl")]
    score([*flags, "--device", "cpu", "--output", str(run / "latest" / "p.json")])
    card = card_of(run, tmp_path)
    val, scored = json.loads((run / "v.json").read_text()), json.loads((run / "latest" / "p.json").read_text())
    assert values(card) == {
        ("python-docs", "loss"): val["loss"], ("python-docs", "perplexity"): val["perplexity"],
        ("python-docs", "bits_per_byte"): val["bits_per_byte"],
        ("piqa", "acc"): scored["acc"], ("piqa", "acc_norm"): scored["acc_norm"],
    }  # fmt: skip
    assert f"loss, {val['tokens']:,} tokens" in card.text and "acc, harness style, 6 items" in card.text
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    piqa = next(result for result in card.data.eval_results if result.dataset_name == "piqa")
    assert (piqa.task_type, piqa.dataset_type, piqa.dataset_split) == ("text-generation", "baber/piqa", "validation")
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag, data.language) == (
        "apache-2.0", "transformers", "text-generation", "en",
    )  # fmt: skip
    record, state = (json.loads((run / name).read_text()) for name in ("run.json", "latest/trainer_state.json"))
    facts = dict(line.strip("| ").split(" | ")[:2] for line in card.text.splitlines() if line.startswith("| "))
    assert facts["tokens"] == f"{state['tokens']:,}" == "1,024"
    assert facts["learning_rate"] == str(record["recipe"]["learning_rate"])
    assert facts["commit"].startswith(record["starts"][-1]["git_commit"])
    assert facts["last training loss"] == f"{train_rows(run)[4]['loss']:.4f}"
    assert f"{record['model']['parameters']:,} parameters" in card.text
    assert "\n# model\n" in card.text and "![Loss over tokens](curves.png)" in card.text
    assert str(tmp_path) not in str(card) and str(tiny_dataset.parent) not in str(card) and str(ROOT) not in str(card)


def test_a_figure_of_other_weights_or_of_unknown_ones_is_left_out(run, tmp_path):
    weights = hashlib.sha256((run / "latest" / "model.safetensors").read_bytes()).hexdigest()
    figure = {"model": "anywhere", "weights_sha256": weights, "task": "piqa", "acc": 0.75, "n": 100}
    for place in (run / "piqa.json", run / "latest" / "piqa.json"):
        place.write_text(json.dumps(figure))
        assert values(card_of(run, tmp_path))["piqa", "acc"] == 0.75
        for other in ({"weights_sha256": "0" * 64}, {"weights_sha256": None, "model": str(run / "latest")}):
            place.write_text(json.dumps({**figure, **other}))
            assert ("piqa", "acc") not in values(card_of(run, tmp_path))
        place.unlink()


def test_a_dataset_of_the_hub_is_named_in_the_metadata(run, tmp_path):
    record = json.loads((run / "run.json").read_text())
    source = {"name": "hub", "dataset": "HuggingFaceFW/fineweb-edu", "config": "sample-10BT", "revision": "abc"}
    (run / "run.json").write_text(json.dumps({**record, "dataset": {**record["dataset"], "source": source}}))
    card = card_of(run, tmp_path)
    assert card.data.datasets == ["HuggingFaceFW/fineweb-edu"]
    assert {result.dataset_type for result in card.data.eval_results} == {"HuggingFaceFW/fineweb-edu"}
    assert "| training text | HuggingFaceFW/fineweb-edu sample-10BT abc |" in card.text


def test_a_dry_run_makes_the_folder_that_loads_and_asks_no_network(run, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for name, flags, expected, trust in (("ours", [], OURS, True), ("stock", ["--stock"], STOCK, False)):
        folder = tmp_path / name
        assert main([str(run / "latest"), "--repo-id", "me/model", "--dry-run", str(folder), *flags]) == 0
        assert {path.name for path in folder.iterdir()} == expected
        code = "import sys\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        code += f"m = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code={trust})\n"
        code += f"tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code={trust})\n"
        code += "assert len(tokenizer) == m.config.vocab_size\n"
        code += "print(type(m).__name__)\n"
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder)], cwd=tmp_path, capture_output=True, text=True, timeout=600,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == ("GPT2ReproForCausalLM" if trust else "GPT2LMHeadModel")
        assert ("trust_remote_code=True" in (folder / "README.md").read_text()) == trust
        assert (logits(folder) - logits(run / "latest")).abs().max() < 1e-5
        # A copy, not a link: what somebody changes in it is not changed in the run.
        assert (folder / "tokenizer.json").stat().st_nlink == 1


def test_a_published_checkpoint_loads_from_the_hub_with_the_same_logits(run, hub, tmp_path):
    command = [sys.executable, "-m", "gpt2repro.hub.publish", str(run / "latest"), "--repo-id", "me/model"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{hub.url}/me/model/commit/")
    assert set(hub.files["me/model"]) == OURS
    assert hub.private["me/model"] and len(hub.commits) == 1
    code = (
        "import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained('me/model', trust_remote_code=True)\n"
        f"torch.save(model(torch.tensor({TOKENS.tolist()})).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
        "assert len(AutoTokenizer.from_pretrained('me/model', trust_remote_code=True)) == 512\n"
    )
    loaded = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert loaded.returncode == 0, loaded.stderr
    assert (torch.load(tmp_path / "logits.pt") - logits(run / "latest")).abs().max() < 1e-5
    everything = b"".join([done.stdout.encode(), done.stderr.encode(), *hub.files["me/model"].values()])
    assert hub.token.encode() not in everything
    assert str(tmp_path).encode() not in everything


def test_stock_replaces_what_was_published_before(run, hub, capsys):
    assert main([str(run / "latest"), "--repo-id", "model", "--public"]) == 0
    assert not hub.private["me/model"]
    assert main([str(run / "latest"), "--repo-id", "me/model", "--stock"]) == 0
    assert set(hub.files["me/model"]) == STOCK
    assert json.loads(hub.files["me/model"]["config.json"])["model_type"] == "gpt2"
    assert "me/model" in hub.files["me/model"]["README.md"].decode()


def test_an_upload_that_failed_is_completed_by_the_same_command(run, hub, capsys):
    command = [run / "latest", "--repo-id", "me/model"]
    hub.trouble = lambda method, path: 500 if "/commit/" in path else None
    assert "the upload to me/model failed (" in refusal(capsys, *command)
    assert hub.files["me/model"] == {}  # nothing half-published
    sent = sum(method == "PUT" for method, _ in hub.requests)
    hub.trouble = lambda method, path: None
    assert main([str(word) for word in command]) == 0
    assert set(hub.files["me/model"]) == OURS
    assert sent == sum(method == "PUT" for method, _ in hub.requests) == 1  # the weights were not sent again
    weights = hub.files["me/model"]["model.safetensors"]
    assert weights == (run / "latest" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("method", "kind"), [("HEAD", 500), ("PUT", 500), ("PUT", "drop")])
def test_one_server_error_or_lost_connection_does_not_end_an_upload(run, hub, method, kind, capsys):
    troubles = [kind]
    hub.trouble = lambda asked, path: troubles.pop() if asked == method and troubles else None
    assert main([str(run / "latest"), "--repo-id", "me/model"]) == 0
    assert not troubles and set(hub.files["me/model"]) == OURS
    assert hub.token not in "".join(capsys.readouterr())


def test_without_network_token_or_rights_one_line_says_so_and_nothing_is_published(run, hub, capsys, monkeypatch):
    line = refusal(capsys, run / "latest", "--repo-id", "other/model")
    assert "does not let us write to 'other/model' (" in line and "You don't have the rights" in line
    assert "'a/b/c'" in refusal(capsys, run / "latest", "--repo-id", "a/b/c")
    hub.trouble = lambda method, path: 403 if "auth-check" in path else None
    assert "does not let us write to 'me/model' (" in refusal(capsys, run / "latest", "--repo-id", "me/model")
    hub.trouble = lambda method, path: None
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    line = refusal(capsys, run / "latest", "--repo-id", "me/model")
    assert "does not let us write" in line and "hf_wrong" not in line
    monkeypatch.delenv("HF_TOKEN")
    line = refusal(capsys, run / "latest", "--repo-id", "me/model")
    assert "there is no token for the Hub: run `hf auth login`" in line and "'me/model'" in line
    hub.requests.clear()
    hub.trouble = lambda method, path: 502  # as a proxy answers without a network behind it
    line = refusal(capsys, run / "latest", "--repo-id", "me/model")
    assert f"the Hub does not answer at {hub.url}" in line and "'me/model'" in line
    assert [asked for asked in hub.requests if asked[0] in ("HEAD", "POST")] == [("HEAD", "/")] * 2
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    line = refusal(capsys, run / "latest", "--repo-id", "me/model")
    assert "the Hub does not answer at http://127.0.0.1:9" in line and "'me/model'" in line
    assert hub.commits == [] and not any(hub.files.values())


def test_what_is_no_complete_checkpoint_is_not_published(run, hub, tmp_path, capsys):
    latest = (run / "latest").resolve()
    (tmp_path / "empty").mkdir()
    stock = tmp_path / "stock"
    assert main([str(latest), "--repo-id", "me/model", "--dry-run", str(stock), "--stock"]) == 0
    capsys.readouterr()
    for path, change, expected in (
        (tmp_path / "nowhere", None, "there is no folder"),
        (tmp_path / "empty", None, "no checkpoint loads from"),
        (stock, stock / "tokenizer.json", "no tokenizer loads from"),
        (latest, latest / "config.json", "config.json is missing"),
        (latest, latest / "trainer_state.json", "its saving was not finished"),
    ):
        if change:
            change.unlink()
        assert expected in refusal(capsys, path, "--repo-id", "me/model")
    (run / "step-00000006" / "model.safetensors").write_bytes(b"half")
    assert "model.safetensors has 4 bytes" in refusal(capsys, run / "step-00000006", "--repo-id", "me/model")
    (tmp_path / "full").mkdir()
    assert hub.files == {}


def test_only_the_files_of_a_checkpoints_record_are_published(run, tmp_path, capsys):
    latest = (run / "latest").resolve()
    (latest / "merges.txt").write_text("a note of somebody")
    (latest / "model-extra.safetensors").write_bytes(b"")
    folder = tmp_path / "dry"
    assert main([str(latest), "--repo-id", "me/model", "--dry-run", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == OURS
    (latest / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (latest / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    line = refusal(capsys, latest, "--repo-id", "me/model", "--dry-run", tmp_path / "linked")
    assert "tokenizer.json is a symbolic link" in line


def test_a_record_that_names_a_file_outside_of_its_folder_is_refused(run, tmp_path, capsys):
    secret, record = run / "secret", run / "latest" / "trainer_state.json"
    secret.write_text("a token")
    state = json.loads(record.read_text())
    state["files"]["../secret"] = {"bytes": 7, "sha256": hashlib.sha256(b"a token").hexdigest()}
    del state["sha256"]
    record.write_text(json.dumps({**state, "sha256": seal(state)}))
    line = refusal(capsys, run / "latest", "--repo-id", "me/model", "--dry-run", tmp_path / "dry")
    assert "names '../secret', which is outside of the folder" in line
    assert not (tmp_path / "dry").exists()


def test_the_hash_of_weights_is_that_of_every_file_that_is_loaded_and_of_no_other(tmp_path):
    assert weights_sha256(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"a")
    alone = weights_sha256(tmp_path)
    for name in ("model.ema.safetensors", "optimizer.safetensors"):
        (tmp_path / name).write_bytes(b"b")
    assert weights_sha256(tmp_path) == alone == hashlib.sha256(b"a").hexdigest()
    (tmp_path / "adapter_model.safetensors").write_bytes(b"b")
    assert weights_sha256(tmp_path) not in (alone, None)


def test_nothing_but_the_model_of_a_folder_without_a_record_is_published(run, tmp_path):
    convert(run / "latest", tmp_path / "stock", to="gpt2")
    (tmp_path / "secret").write_text("a token")
    for name in ("merges.txt", "notes.json", "optimizer.pt"):
        (tmp_path / "stock" / name).symlink_to(tmp_path / "secret")
    assert main([str(tmp_path / "stock"), "--repo-id", "me/model", "--dry-run", str(tmp_path / "dry")]) == 0
    assert {path.name for path in (tmp_path / "dry").iterdir()} == STOCK
    assert not any(b"a token" in path.read_bytes() for path in (tmp_path / "dry").iterdir())


def test_the_license_of_the_weights_is_that_of_their_source(run, tmp_path):
    def card(checkpoint, *flags):
        folder = tmp_path / f"dry-{len(list(tmp_path.iterdir()))}"
        assert main([str(checkpoint), "--repo-id", "me/model", "--dry-run", str(folder), *flags]) == 0
        return ModelCard.load(folder / "README.md").data

    convert(run / "latest", tmp_path / "stock", to="gpt2")
    assert card(tmp_path / "stock").license == "apache-2.0"
    (tmp_path / "stock" / "README.md").write_text("---\nlicense: mit\nlanguage: de\nbase_model: a/b\n---\n")
    convert(tmp_path / "stock", tmp_path / "ours", to="gpt2repro")
    data = card(tmp_path / "ours")
    assert (data.license, data.language, data.base_model) == ("mit", "de", "a/b")
    data = card(tmp_path / "ours", "--license", "cc0-1.0", "--language", "fr")
    assert (data.license, data.language) == ("cc0-1.0", "fr")
    record = json.loads((run / "run.json").read_text())
    for init_from, expected, base_model in (
        ("openai-community/gpt2", "mit", "openai-community/gpt2"),
        ("someone/gpt2", None, "someone/gpt2"),
        (str(tmp_path / "ours"), "mit", "a/b"),
        (str(tmp_path / "gone"), None, None),
    ):
        (run / "run.json").write_text(json.dumps({**record, "recipe": {**record["recipe"], "init_from": init_from}}))
        data = card(run / "latest")
        assert (data.license, data.base_model) == (expected, base_model)


def test_a_converted_folder_is_published_without_a_run_around_it(run, hub, tmp_path):
    convert(run / "latest", tmp_path / "stock", to="gpt2")
    assert main([str(tmp_path / "stock"), "--repo-id", "me/model"]) == 0
    assert set(hub.files["me/model"]) == STOCK
    card = ModelCard(hub.files["me/model"]["README.md"].decode())
    assert "42,880 parameters, converted" in card.text and "## Training" not in card.text
    (tmp_path / "back").mkdir()
    for name, content in hub.files["me/model"].items():
        (tmp_path / "back" / name).write_bytes(content)
    assert isinstance(GPT2LMHeadModel.from_pretrained(tmp_path / "back"), GPT2LMHeadModel)


def pushed(pushes, count, seconds=600):
    rows, deadline = [], time.monotonic() + seconds
    while len(rows) < count:
        rows += pushes.finished()
        assert time.monotonic() < deadline, rows
        time.sleep(0.05)
    return rows


def test_of_checkpoints_that_come_during_a_push_the_newest_is_next(run, hub):
    hub.files["me/model"] = {}
    all_submitted = threading.Event()

    def hold_the_weights(method, path):
        if method == "PUT":
            all_submitted.wait(600)

    hub.trouble = hold_the_weights
    (run / ".push-step-00000003").mkdir()  # of a run that was killed
    pushes = HubPush(RECIPE, run_dir=run)
    shutil.copytree(run / "step-00000006", run / "step-00000007")
    for step in ("step-00000006", "step-00000007", "step-00000008"):
        pushes.submit(run / step)
        shutil.rmtree(run / step)  # pruned while it is on its way
    assert pushes.finished() == []  # nobody waited for the first
    all_submitted.set()
    rows = pushed(pushes, 2)
    assert [row["checkpoint_step"] for row in rows] == [6, 8] and all(row["url"].startswith(hub.url) for row in rows)
    assert hub.commits == ["Upload step-00000006", "Upload step-00000008"]
    assert pushes.wait(stopped=False) == []
    assert not list(run.glob(".push-*"))


@pytest.mark.parametrize("end", ["time", "stopped", "signal"])
def test_a_push_that_hangs_is_ended_when_the_run_ends_or_is_stopped(run, hub, monkeypatch, end):
    hub.files["me/model"] = {}
    hanging = threading.Event()

    def hang(method, path):
        if method == "POST":
            hanging.set()
            return "hang"

    pushes = HubPush(RECIPE, run_dir=run)
    hub.trouble = hang
    pushes.submit(run / "step-00000006")
    pushes.submit(run / "step-00000008")
    assert hanging.wait(600) and pushes.finished() == []
    began = time.monotonic()
    if end == "time":
        monkeypatch.setattr(push, "PUSH_WAIT_SECONDS", 1)
    rows = pushes.wait(stopped=end == "stopped", give_up=lambda: end == "signal")
    assert time.monotonic() - began < 60  # and not 600, nor as long as the Hub hangs
    assert [(row["checkpoint_step"], row["error"]) for row in rows] == [
        (6, f"not finished when the run ended, {AGAIN}"), (8, f"not begun when the run ended, {AGAIN}"),
    ]  # fmt: skip
    assert not list(run.glob(".push-*"))


def test_a_push_stays_in_a_folder_that_is_moved_and_spares_the_one_that_runs(run, hub):
    hub.files["me/model"] = {}
    all_submitted = threading.Event()
    hub.trouble = lambda method, path: all_submitted.wait(600) and None if method == "PUT" else None
    pushes = HubPush(RECIPE, run_dir=run)
    held = os.open(run, os.O_RDONLY)
    by_descriptor = Path(f"/proc/{os.getpid()}/fd/{held}")  # as a run names its open directory
    pushes.submit(by_descriptor / "step-00000006")
    moved = run.rename(run.with_name("moved"))
    pushes.submit(by_descriptor / "step-00000008")
    assert {path.name for path in moved.glob(".push-*")} == {".push-step-00000006", ".push-step-00000008"}
    assert not run.exists()
    pushes.wait(stopped=True)
    all_submitted.set()
    os.close(held)


def test_a_push_that_cannot_even_start_is_reported_and_no_more(run, hub, monkeypatch):
    pushes = HubPush(RECIPE, run_dir=run)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    pushes.submit(run / "step-00000006")
    (run / "step-00000008" / "config.json").unlink()
    pushes.submit(run / "step-00000008")
    rows = pushes.finished()
    assert [row["checkpoint_step"] for row in rows] == [6, 8] and "/nowhere/python" in rows[0]["error"]
    assert pushes.wait(stopped=False) == [] and not list(run.glob(".push-*"))


def test_a_run_pushes_in_the_background_and_its_last_checkpoint_is_awaited(train_script, hub, tmp_path):
    run = tmp_path / "run"
    fields = {"hub_repo_id": "me/model", "hub_every": 3, "keep_last": 1, "max_steps": 7}
    output = train_script(run, processes=2, env=os.environ, **fields)
    assert hub.private["me/model"]
    assert hub.commits[-1] == "Upload step-00000007" and len(hub.commits) in (2, 3)  # of 3 and 6 one may wait too long
    assert hub.files["me/model"]["model.safetensors"] == (run / "latest" / "model.safetensors").read_bytes()
    assert f"push of step 7 to {hub.url}/me/model/commit/" in output and hub.token not in output
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["checkpoint_step"] for row in rows if row["kind"] == "push"][-1] == 7
    assert sorted(path.name for path in run.iterdir()) == [
        "latest", "metrics.jsonl", "recipe.yaml", "run.json", "step-00000007",
    ]  # fmt: skip
    card = ModelCard(hub.files["me/model"]["README.md"].decode())
    assert values(card)["python-docs", "loss"] == train_rows(run, "val")[7]["loss"]


def test_a_run_whose_hub_dies_in_the_middle_ends_well_and_says_so(train_script, hub, unbroken_run, tmp_path):
    commits = []

    def die_at_the_first_push(method, path):
        if "/commit/" in path:
            commits.append(path)
        if len(commits) > 1:  # the first one is that of the run's start
            hub.server.socket.close()  # nobody listens from now on
            return "drop"

    hub.trouble = die_at_the_first_push
    fields = {"hub_repo_id": "me/model", "hub_every": 3, "hub_state": "true"}
    output = train_script(tmp_path / "run", env=os.environ, **fields)
    assert "mirror of step 8 failed: " in output
    warnings = [line for line in output.splitlines() if " failed: the upload to me/model failed (" in line]
    assert 1 <= len(warnings) <= 3 and "push of step 8 failed" in warnings[-1]
    assert "done: step 8" in output and "Traceback" not in output
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in rows if row["kind"] == "push" and row["error"]]) == len(warnings)
    assert_same_bits(tmp_path / "run", unbroken_run)
    assert hub.files["me/model"] == {}


def test_the_push_of_a_run_that_was_killed_comes_before_those_of_its_next_start_or_not_at_all(run, hub):
    hub.files["me/model"] = {}
    asked, released, replied = threading.Event(), threading.Event(), threading.Event()
    reply = hub.reply

    def hold_the_first_commit(method, path, *rest):
        if "/commit/" not in path or asked.is_set():
            return reply(method, path, *rest)
        asked.set()
        released.wait(600)
        outcome = reply(method, path, *rest)
        replied.set()
        return outcome

    hub.reply = hold_the_first_commit
    killed = HubPush(RECIPE, run_dir=run)
    killed.submit(run / "step-00000006")
    assert asked.wait(600)
    killed._process.kill()  # its request has arrived
    pushes = HubPush(RECIPE, run_dir=run)
    pushes.submit(run / "step-00000008")
    (row,) = pushed(pushes, 1)
    assert "url" in row, row
    released.set()
    assert replied.wait(600)
    assert hub.commits == ["Upload step-00000008"]
    assert hub.files["me/model"]["model.safetensors"] == (run / "step-00000008" / "model.safetensors").read_bytes()


def test_a_push_that_somebody_elses_commit_preceded_follows_it(run, hub):
    hub.files["me/model"] = {}

    def edit_the_card_first(method, path):
        if "/commit/" in path:
            hub.files["me/model"].setdefault("NOTES.md", b"edited on the Hub")

    hub.trouble = edit_the_card_first
    pushes = HubPush(RECIPE, run_dir=run)
    pushes.submit(run / "step-00000008")
    assert "url" in pushed(pushes, 1)[0]
    assert hub.commits == ["Upload step-00000008"] and set(hub.files["me/model"]) == {*OURS, "NOTES.md"}


def test_a_push_ends_with_a_run_that_is_killed_and_the_same_command_pushes_what_is_missing(
    train_script, hub, tmp_path
):
    at_the_commit = threading.Event()

    def hang_at_the_commit(method, path):
        if "/commit/" in path:
            at_the_commit.set()
            return "hang"

    hub.trouble = hang_at_the_commit
    process = train_script.start(tmp_path / "run", env=os.environ, hub_repo_id="me/model")
    wait_until(at_the_commit.is_set, process)  # of the last checkpoint, when nothing else is left to do
    (push_process,) = psutil.Process(process.pid).children()
    process.kill()
    assert psutil.wait_procs([push_process], timeout=60)[1] == []
    hub.trouble = lambda method, path: None
    assert "push of step 8 to" in train_script(tmp_path / "run", env=os.environ, hub_repo_id="me/model")
    weights = (tmp_path / "run" / "latest" / "model.safetensors").read_bytes()
    assert hub.commits == ["Upload step-00000008"] and hub.files["me/model"]["model.safetensors"] == weights
    assert " push of step" not in train_script(tmp_path / "run", env=os.environ, hub_repo_id="me/model")
    assert len(hub.commits) == 1


@pytest.mark.parametrize(
    ("rows", "step", "expected"),
    [
        ([], 1, False),  # step 2 is the first
        ([], 3, True),
        ([(2, "https://hub/me/model/commit/1")], 3, False),
        ([(2, "https://hub/me/model/commit/1")], 5, True),
        ([(2, "https://hub/me/other/commit/1")], 3, True),
        ([(2, None)], 3, True),
        ([(8, "https://hub/me/model/commit/1")], 8, False),
        ([(8, "https://hub/me/model/commit/1")], 9, True),  # the last of the run
    ],
)
def test_a_resumed_run_pushes_if_a_checkpoint_that_was_due_did_not_reach_the_hub(
    run, hub, monkeypatch, rows, step, expected
):
    pushes = HubPush(RECIPE, run_dir=run)
    submitted = []
    monkeypatch.setattr(pushes, "submit", submitted.append)
    rows = [{"kind": "push", "checkpoint_step": at, **({"url": url} if url else {"error": "x"})} for at, url in rows]
    pushes.catch_up(run / "step-00000008", step=step, rows=rows)
    assert submitted == ([run / "step-00000008"] if expected else [])
    pushes.catch_up(run.parent / "other" / "step-00000008", step=step, rows=rows)
    pushes.catch_up(None, step=0, rows=[])
    assert len(submitted) == expected


def test_a_run_that_may_not_push_is_refused_before_it_begins(train_script, hub, tmp_path, monkeypatch, capsys):
    def refused(**fields):
        assert train_accelerate.main(train_script.flags(tmp_path / "run", **fields)) == 1
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err.splitlines()

    assert refused(hub_every=4) == [
        "error: hub_every is 4 without a hub_repo_id: give OWNER/NAME, or leave it out",
        "error: hub_every=4 is not a multiple of save_every=3: change one",
    ]
    (line,) = refused(hub_repo_id="other/model")
    assert line.startswith("error: the Hub does not let us write to 'other/model'")
    monkeypatch.delenv("HF_TOKEN")
    (line,) = refused(hub_repo_id="me/model", hub_every=6)
    assert line.startswith("error: there is no token for the Hub")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    (line,) = refused(hub_repo_id="me/model")
    assert line.startswith("error: the Hub does not answer at http://127.0.0.1:9")
    assert hub.files == {}


def test_a_centered_accuracy_over_fewer_tasks_is_not_called_core():
    figure = {"task": "core", "core": 0.1, "n": 40, "tasks": {"copa": {}, "piqa": {}}}
    for complete, name in ((False, "core, 40 items, 2 tasks: not CORE"), (True, "core, 40 items")):
        figures = {("core", None): {**figure, "complete": complete}}
        assert [result.metric_name for result in eval_results(figures, step=None, on_hub={})] == [name]
