"""CORE: the protocol of nanochat, item for item, and what a damaged bundle or row does."""

import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.core_parity import ForNanochat, reference_verdict
from benchmarks.measuring import load_file
from configuration_gpt2repro import GPT2ReproConfig
from eval import core_tasks
from eval.core import core_figures, core_text, main, prepare_core, score_rows, task_figures
from eval.core_tasks import PUBLISHED_ROWS, CoreTask, bundle_folder, encode, prompts, read_bundle, read_rows
from eval.multiple_choice import evaluate_tasks, prepare_task
from modeling_gpt2repro import GPT2ReproForCausalLM

WORDS = "man ball neck throws milk bowl plant water rice wheat corn moss yes no time".split()
ROOT = Path(__file__).resolve().parents[2]


def sentence(draw: random.Random, least: int, most: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Three tasks of the published layout, one of each type, of 14 rows each."""
    folder, draw = tmp_path_factory.mktemp("bundle"), random.Random(0)
    kinds = {"arc_easy": ("multiple_choice", 3), "winograd": ("schema", 0), "jeopardy": ("language_modeling", 2)}
    entries = []
    for label, (kind, shots) in kinds.items():
        rows = []
        for _ in range(14):
            options = [sentence(draw, 1, 4) for _ in range(3)]
            rows.append(
                {
                    "multiple_choice": {"query": sentence(draw, 3, 9), "choices": options, "gold": draw.randrange(3)},
                    "schema": {"context_options": options, "continuation": sentence(draw, 2, 5), "gold": 1},
                    "language_modeling": {"context": sentence(draw, 3, 6) + " ", "continuation": draw.choice(WORDS)},
                }[kind]
            )
        file = folder / "eval_data" / "some" / f"{label}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        entries.append(
            {
                "label": label, "dataset_uri": f"some/{label}.jsonl", "num_fewshot": [shots], "icl_task_type": kind,
                "continuation_delimiter": "\nAnswer: ",
            }
        )
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}))
    lines = ["Eval Task,Random baseline", "arc_easy,25.0", "winograd,50.0", "jeopardy,0.0"]
    (folder / "eval_meta_data.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def reference():
    """nanochat's own code, from a checkout named by the environment."""
    if not (path := os.environ.get("NANOCHAT_CORE_EVAL")):
        pytest.skip("set NANOCHAT_CORE_EVAL to nanochat's nanochat/core_eval.py to compare with it")
    return load_file(path, "nanochat's nanochat/core_eval.py")


@pytest.fixture(scope="module")
def taught_model(bundle, bpe):
    """A model that was trained on the answers of every second row: of any other, every continuation is wrong."""
    torch.manual_seed(0)
    config = GPT2ReproConfig(vocab_size=len(bpe), n_positions=64, n_layer=2, n_head=2, n_embd=32)
    model = GPT2ReproForCausalLM(config)
    items = []
    for own in read_bundle(bundle):
        rows = read_rows(own)
        items += filter(None, encode(own, rows, range(0, len(rows), 2), bpe, max_length=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        for item in items:
            target = torch.tensor(item.targets[item.label])
            logits = model(torch.tensor([item.inputs[item.label]]), logits_to_keep=len(target)).logits[0]
            torch.nn.functional.cross_entropy(logits, target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def task(kind: str, *, shots: int = 0, delimiter: str = " ") -> CoreTask:
    return CoreTask("a task", kind, Path("rows.jsonl"), shots, delimiter, 0.25)


def test_every_verdict_is_that_of_nanochats_code(reference, bundle, tiny_model, stock_model, taught_model, bpe):
    for model in (tiny_model, stock_model, taught_model):  # 64 positions: the texts with examples are cut
        both = ForNanochat(model, bpe)
        for own in read_bundle(bundle):
            rows = read_rows(own)
            ours = [row["correct"] for row in score_rows(model, bpe, own, rows, range(len(rows)))]
            theirs = [reference_verdict(reference, both, own, rows, index) for index in range(len(rows))]
            assert ours == [bool(verdict) for verdict in theirs], own.label


def test_every_prompt_is_that_of_nanochats_templates(reference, bundle):
    for own in read_bundle(bundle):
        rows = read_rows(own)
        for index in range(len(rows)):
            others = [row for number, row in enumerate(rows) if number != index]
            examples = random.Random(1234 + index).sample(others, own.shots)
            render = {
                "multiple_choice": reference.render_prompts_mc, "schema": reference.render_prompts_schema,
                "language_modeling": reference.render_prompts_lm,
            }[own.kind]
            assert prompts(own, rows, index) == render(rows[index], own.delimiter, examples)


def test_a_prompt_has_its_examples_and_then_the_row():
    rows = [{"query": f"Q{n}", "choices": [f"a{n}", f"b{n}"], "gold": n % 2} for n in range(4)]
    first, second = random.Random(1234 + 2).sample([0, 1, 3], 2)
    right = {0: "a0", 1: "b1", 3: "b3"}
    examples = f"Q{first} is {right[first]}\n\nQ{second} is {right[second]}\n\n"
    assert prompts(task("multiple_choice", shots=2, delimiter=" is "), rows, 2) == [
        examples + "Q2 is a2", examples + "Q2 is b2",
    ]  # fmt: skip


def test_rows_come_in_the_order_of_nanochat_and_a_limit_keeps_the_first(bundle):
    own = read_bundle(bundle, labels=["arc_easy"])[0]
    rows = [json.loads(line) for line in own.path.read_text().splitlines()]
    random.Random(1337).shuffle(rows)
    assert read_rows(own) == rows
    assert read_rows(own, limit=5) == rows[:5]


def spans(kind: str, row: dict, bpe, *, delimiter: str = " "):
    """The scored texts of a row without examples."""
    item = encode(task(kind, delimiter=delimiter), [row], [0], bpe, max_length=64)[0]
    return item and [bpe.decode(target) for target in item.targets]


def test_scored_is_what_follows_the_common_beginning_the_common_end_or_the_continuation(bpe):
    choices = {"query": "The man", "choices": ["throws milk", "throws rice"], "gold": 0}
    assert spans("multiple_choice", choices, bpe) == [" milk", " rice"]
    contexts = {"context_options": ["The man", "The woman"], "continuation": "throws it", "gold": 0}
    assert spans("schema", contexts, bpe)[0] == spans("schema", contexts, bpe)[1]
    assert spans("schema", contexts, bpe)[0].endswith(" throws it")
    assert spans("language_modeling", {"context": "The man ", "continuation": "throws it"}, bpe) == [" throws it"]


def test_a_row_is_wrong_and_counted_if_its_text_is_no_beginning_or_a_scored_token_is_cut(bpe, tiny_model):
    half_a_word = {"context": "The ma", "continuation": "n holds"}  # " man" is one token
    assert spans("language_modeling", half_a_word, bpe, delimiter="") is None
    long = {"query": "The man", "choices": ["throws " * 70, "holds " * 70], "gold": 0}
    assert spans("multiple_choice", long, bpe) is None
    results = list(score_rows(tiny_model, bpe, task("multiple_choice"), [long], [0]))
    assert results == [{"task": "a task", "index": 0, "correct": False, "scored": False}]
    assert task_figures(task("multiple_choice"), results)["not_scored"] == 1


def test_of_equal_choices_the_first_wins(bpe, tiny_model):
    row = {"query": "The man", "choices": ["throws milk", "throws milk", "holds"], "gold": 1}
    result = next(score_rows(tiny_model, bpe, task("multiple_choice"), [row], [0]))
    assert result["prediction"] in (0, 2)


def test_the_batch_size_and_the_share_change_no_verdict(bundle, tiny_model, bpe):
    for own in read_bundle(bundle):
        rows = read_rows(own)
        whole = list(score_rows(tiny_model, bpe, own, rows, range(len(rows))))
        assert list(score_rows(tiny_model, bpe, own, rows, range(len(rows)), batch_size=1)) == whole
        shares = [score_rows(tiny_model, bpe, own, rows, range(rank, len(rows), 2)) for rank in (0, 1)]
        assert sorted((row for share in shares for row in share), key=lambda row: row["index"]) == whole


def test_a_model_that_learned_the_answers_is_right(bundle, bpe, taught_model):
    own = read_bundle(bundle, labels=["jeopardy"])[0]
    rows = read_rows(own)
    items = encode(own, rows, range(len(rows)), bpe, max_length=64)
    results = list(score_rows(taught_model, bpe, own, rows, range(len(rows))))
    assert sum(row["correct"] for row in results[::2]) >= 6
    assert all(row["tokens"] == item.targets[0] for row, item in zip(results, items, strict=True) if row["correct"])


def test_the_command_writes_figures_and_items(bundle, checkpoint, tmp_path, capsys):
    output = tmp_path / "core.json"
    assert main(["--model", str(checkpoint), "--bundle", str(bundle), "--output", str(output), "--device", "cpu"]) == 0
    figures = json.loads(output.read_text())
    items = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    assert [(row["task"], row["index"]) for row in items] == [
        (label, index) for label in ("arc_easy", "winograd", "jeopardy") for index in range(14)
    ]
    baselines = {"arc_easy": 0.25, "winograd": 0.5, "jeopardy": 0.0}
    for label, figure in figures["tasks"].items():
        right = [row["correct"] for row in items if row["task"] == label]
        assert figure["accuracy"] == sum(right) / 14 and figure["n"] == 14
        assert figure["centered"] == pytest.approx((sum(right) / 14 - baselines[label]) / (1 - baselines[label]))
    centered = [figure["centered"] for figure in figures["tasks"].values()]
    assert figures["core"] == pytest.approx(sum(centered) / 3)
    assert not figures["complete"] and "not CORE: 3 tasks of 22" in capsys.readouterr().out
    assert len(figures["weights_sha256"]) == 64 and figures["dtype"] == "float32"


def test_two_processes_give_the_figures_of_one(bundle, checkpoint, tmp_path):
    outputs = []
    for processes in (1, 2):
        outputs.append(tmp_path / f"{processes}.json")
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        command += ["--multi_gpu"] if processes > 1 else ["--cpu"]
        command += ["-m", "eval.core", "--model", str(checkpoint), "--bundle", str(bundle), "--device", "cpu"]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--output", str(outputs[-1])], check=True, cwd=ROOT, env=environment)
    one, two = (path.with_suffix(".jsonl").read_text() for path in outputs)
    assert one == two
    assert json.loads(outputs[0].read_text())["tasks"] == json.loads(outputs[1].read_text())["tasks"]


def test_a_run_scores_it_at_every_validation(bundle, tiny_model, bpe):
    row = evaluate_tasks(tiny_model, [prepare_task(f"core:8={bundle}", bpe, max_length=64)])[0]
    assert row["task"] == "core" and row["limit"] == 8 and row["tasks"]["winograd"]["n"] == 8
    assert -1 < row["core"] < 1
    with pytest.raises(ValueError, match="CORE is core, core:LIMIT"):
        prepare_core(f"core:few={bundle}", bpe)


def test_only_all_rows_of_all_tasks_are_called_core():
    def tasks(**others):
        return {label: {"n": n, "centered": 0.5} for label, n in {**PUBLISHED_ROWS, **others}.items()}

    assert core_text(core_figures(tasks())) == "CORE 0.5000"
    assert core_text(core_figures(tasks(copa=50))) == (
        "mean centered accuracy 0.5000; not CORE: 22 tasks of 22, 1 of them with fewer rows than published"
    )


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "core.yaml").unlink(), "no bundle of CORE"),
        (lambda folder: (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n"), "arc_easy"),
        (lambda folder: (folder / "eval_data/some/winograd.jsonl").unlink(), "a file that exists"),
        (lambda folder: (folder / "eval_data/some/winograd.jsonl").write_text(""), "has 0 rows"),
        (lambda folder: cut(folder / "eval_data/some/arc_easy.jsonl", 3), "3 few-shot examples need at least 4"),
        (lambda folder: replace(folder / "eval_data/some/arc_easy.jsonl", "gold\": ", "gold\": 7"), "1: gold is 7"),
        (lambda folder: replace(folder / "eval_data/some/arc_easy.jsonl", "choices", "option"), "needs the fields"),
        (lambda folder: replace(folder / "eval_data/some/jeopardy.jsonl", "{", "["), "jeopardy.jsonl, line 1"),
    ],
)
def test_a_damaged_bundle_is_one_error(bundle, checkpoint, tmp_path, capsys, damage, message):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    damage(folder)
    assert main(["--model", str(checkpoint), "--bundle", str(folder), "--output", str(tmp_path / "core.json")]) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "core.json").exists()


def cut(path: Path, lines: int) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))


def replace(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new, 1))


def test_a_tokenizer_without_a_token_to_begin_with_is_one_error(bundle, bpe, tiny_model):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=bpe.backend_tokenizer)
    own = read_bundle(bundle, labels=["winograd"])[0]
    with pytest.raises(ValueError, match="neither a bos nor an eos token"):
        list(score_rows(tiny_model, bare, own, read_rows(own), [0]))


def test_the_published_bundle_is_downloaded_once_and_kept(bundle, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as archive:
        for file in bundle.rglob("*"):
            archive.write(file, Path("eval_bundle") / file.relative_to(bundle))
    monkeypatch.setattr(core_tasks.constants, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(core_tasks, "BUNDLE", (tmp_path / "bundle.zip").as_uri())
    folder = bundle_folder()
    (tmp_path / "bundle.zip").unlink()
    assert bundle_folder() == folder
    assert [own.label for own in read_bundle(folder)] == ["arc_easy", "winograd", "jeopardy"]


def test_a_failed_download_leaves_nothing_and_names_the_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(core_tasks.constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(core_tasks, "BUNDLE", "http://127.0.0.1:9/eval_bundle.zip")
    with pytest.raises(OSError, match="give --bundle the folder"):
        bundle_folder()
    assert not (tmp_path / "gpt2repro" / "eval_bundle").exists()
