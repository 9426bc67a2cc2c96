"""The scorer against one forward per choice, whatever the batch, the processes, the padding; and what it refuses."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eval.accuracy import accuracy, summarise
from eval.hellaswag import main
from eval.multiple_choice import evaluate_tasks, prepare_task, score_task
from eval.scoring import Sequences, score_items
from eval.tasks import TASKS, Row, read_rows, render


def hellaswag_rows(count: int) -> list[dict]:
    """Rows with HellaSwag's fields and with contexts and endings of many lengths."""
    words = "the man holds a ball against his neck and throws it far then stirs milk into the bowl".split()
    rows = []
    for index in range(count):
        context = " ".join(words[index % 5 : index % 5 + 1 + index % 9])
        endings = [" ".join(words[(index + k) % 7 : (index + k) % 7 + 1 + (index * k) % 6]) for k in range(4)]
        ctx_b = "a woman" if index % 2 else ""
        row = {"activity_label": "Ball", "ctx_a": context, "ctx_b": ctx_b, "ctx": f"{context} {ctx_b}".strip()}
        rows.append({**row, "endings": endings, "label": index % 4})
    return rows


@pytest.fixture(scope="module")
def rows():
    return [Row(f"row {index}", fields) for index, fields in enumerate(hellaswag_rows(40))]


@torch.no_grad()
def slow_completion(model, tokenizer, row: dict) -> tuple[list[float], int, int]:
    """One ending, one token at a time, as the definition of the style says: sums, argmax of sums, argmax of means."""
    sums, means = [], []
    for ending in row["endings"]:
        ids = tokenizer(row["ctx"])["input_ids"]
        own = []
        for token in tokenizer(" " + ending)["input_ids"]:
            own.append(model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[token].item())
            ids = [*ids, token]
        sums.append(sum(own))
        means.append(sum(own) / len(own))
    return sums, max(range(4), key=sums.__getitem__), max(range(4), key=means.__getitem__)


def in_order(results: list[dict]) -> list[dict]:
    return sorted(results, key=lambda result: result["index"])


def test_completion_style_equals_one_token_at_a_time_for_every_item(tiny_model, bpe, rows):
    results = in_order(score_task(tiny_model, bpe, "hellaswag", items=rows, style="completion", batch_size=7))
    assert len(results) == len(rows)
    for result, row in zip(results, rows, strict=True):
        sums, prediction, prediction_norm = slow_completion(tiny_model, bpe, row.fields)
        assert result["scores"] == pytest.approx(sums, abs=1e-4)
        assert (result["prediction"], result["prediction_norm"]) == (prediction, prediction_norm)
    assert len({result["prediction_norm"] for result in results}) == 4  # a model that always says 0 would pass too


@pytest.mark.slow
def test_completion_style_equals_one_ending_at_a_time_on_real_items(shared_dir, gpt2_tokenizer, capsys):
    from configuration_gpt2repro import GPT2ReproConfig
    from modeling_gpt2repro import GPT2ReproForCausalLM

    torch.manual_seed(0)
    config = GPT2ReproConfig(n_layer=4, n_head=4, n_embd=128, initializer_range=0.2)
    model = GPT2ReproForCausalLM(config).eval()
    rows = read_rows("hellaswag", data=shared_dir / "eval" / "hellaswag" / "data.jsonl")
    results = in_order(score_task(model, gpt2_tokenizer, "hellaswag", items=rows, style="completion"))
    apart = 0.0
    for result, row in zip(results, rows, strict=True):
        sums, means = [], []
        for ending in row.fields["endings"]:
            context, own = gpt2_tokenizer(row.fields["ctx"])["input_ids"], gpt2_tokenizer(" " + ending)["input_ids"]
            with torch.no_grad():
                log_probs = model(torch.tensor([context + own])).logits[0].double().log_softmax(-1)
            picked = log_probs[len(context) - 1 : -1].gather(1, torch.tensor(own)[:, None])
            sums.append(picked.sum().item())
            means.append(picked.mean().item())
            apart = max(apart, abs(sums[-1] - result["scores"][len(sums) - 1]) / len(own))
        assert result["prediction"] == max(range(4), key=sums.__getitem__)
        assert result["prediction_norm"] == max(range(4), key=means.__getitem__)
    assert apart < 1e-4
    with capsys.disabled():
        print({"max_difference_per_token": apart, **summarise(results)})


@pytest.mark.parametrize("style", ["completion", "harness"])
def test_scores_do_not_depend_on_batch_size_sharing_or_attention(tiny_model, bpe, rows, style):
    reference = in_order(score_task(tiny_model, bpe, "hellaswag", items=rows, style=style, batch_size=1))
    variants = [{"batch_size": 7}, {"batch_size": 64}, {"batch_size": 64, "share_prefix": False}]
    for variant in variants:
        results = in_order(score_task(tiny_model, bpe, "hellaswag", items=rows, style=style, **variant))
        for result, expected in zip(results, reference, strict=True):
            assert result["scores"] == pytest.approx(expected["scores"], abs=1e-4)
            assert result["prediction"] == expected["prediction"]
            assert result["prediction_norm"] == expected["prediction_norm"]
    tiny_model.set_attn_implementation("eager")
    try:
        eager = in_order(score_task(tiny_model, bpe, "hellaswag", items=rows, style=style))
    finally:
        tiny_model.set_attn_implementation("sdpa")
    for result, expected in zip(eager, reference, strict=True):
        assert result["scores"] == pytest.approx(expected["scores"], abs=1e-4)


def test_processes_share_the_items_and_their_union_is_the_whole(tiny_model, bpe, rows):
    whole = in_order(score_task(tiny_model, bpe, "hellaswag", items=rows))
    options = {"items": rows, "world_size": 3}
    shares = [score_task(tiny_model, bpe, "hellaswag", rank=rank, **options) for rank in range(3)]
    assert sorted(map(len, shares)) == [13, 13, 14]
    union = in_order([result for share in shares for result in share])
    assert [result["prediction"] for result in union] == [result["prediction"] for result in whole]
    assert [result["prediction_norm"] for result in union] == [result["prediction_norm"] for result in whole]


@pytest.mark.slow
@pytest.mark.parametrize("style", ["completion", "harness"])
def test_real_items_have_the_same_predictions_for_every_batch_size_and_number_of_processes(
    style, shared_dir, gpt2_tokenizer
):
    from configuration_gpt2repro import GPT2ReproConfig
    from modeling_gpt2repro import GPT2ReproForCausalLM

    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=2, n_head=2, n_embd=64, initializer_range=0.2)).eval()
    options = {"items": read_rows("hellaswag", data=shared_dir / "eval" / "hellaswag" / "data.jsonl"), "style": style}

    def predicted(**more):
        results = score_task(model, gpt2_tokenizer, "hellaswag", **options, **more)
        return [(result["index"], result["prediction"], result["prediction_norm"]) for result in results]

    expected = sorted(predicted(batch_size=1))
    assert len(expected) == 500
    for more in ({"batch_size": 7}, {"batch_size": 64}, {}):
        assert sorted(predicted(**more)) == expected
    assert sorted(predicted(rank=0, world_size=2) + predicted(rank=1, world_size=2)) == expected


def test_an_architecture_with_its_own_head_is_scored_one_row_per_choice(bpe, rows):
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(bpe), initializer_range=0.3, **shape)).eval()
    results = in_order(score_task(model, bpe, "hellaswag", items=rows[:12], style="completion"))
    for result, row in zip(results, rows[:12], strict=True):
        sums, prediction, _ = slow_completion(model, bpe, row.fields)
        assert result["scores"] == pytest.approx(sums, abs=1e-4)
        assert result["prediction"] == prediction


def test_a_last_word_is_right_where_the_model_would_have_written_it(tiny_model, bpe):
    context = bpe("The man holds the ball against")["input_ids"]
    with torch.no_grad():
        written = tiny_model.generate(torch.tensor([context]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    word = written[0, len(context) :].tolist()
    words = [word, [*word[:2], (word[2] + 1) % 300], [(word[0] + 1) % 300, *word[1:]]]
    items = [Sequences([[*context, *own[:-1]]], [own], [3.0], 0, False) for own in words]
    results = in_order(score_items(tiny_model, items))
    assert [result["prediction"] for result in results] == [0, -1, -1]
    figures = summarise(results)
    assert figures["acc"] == pytest.approx(1 / 3)
    mean = sum(result["scores"][0] for result in results) / 3
    assert figures["perplexity"] == pytest.approx(math.exp(-mean))


def test_items_longer_than_the_model_lose_their_beginning_and_are_counted(tiny_model, bpe):
    long = {"ctx": "the man holds the ball " * 30, "endings": ["far", "against his neck", "ball", "it"], "label": 1}
    result = score_task(tiny_model, bpe, "hellaswag", items=[Row("row 0", long)], style="completion")[0]
    assert summarise([result])["truncated"] == 1
    context = bpe(long["ctx"])["input_ids"]
    for ending, score in zip(long["endings"], result["scores"], strict=True):
        own = bpe(" " + ending)["input_ids"]
        ids = (context + own)[-65:]
        with torch.no_grad():
            log_probs = tiny_model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
        expected = log_probs[-len(own) :].gather(1, torch.tensor(own)[:, None]).sum().item()
        assert score == pytest.approx(expected, abs=1e-4)


def test_a_choice_longer_than_the_model_loses_its_beginning_and_the_other_items_keep_their_scores(tiny_model, bpe):
    long = {"ctx": "the man", "endings": ["far", "the ball " * 50, "it"], "label": 1}
    short = {"ctx": "the man", "endings": ["far", "it"], "label": 1}
    rows = [Row("row 0", long), Row("row 1", short)]
    results = in_order(score_task(tiny_model, bpe, "hellaswag", items=rows, style="completion"))
    alone = score_task(tiny_model, bpe, "hellaswag", items=rows[1:], style="completion")[0]
    assert results[1]["scores"] == pytest.approx(alone["scores"], abs=1e-4)
    assert summarise(results)["truncated"] == 1
    ids = bpe(" " + long["endings"][1])["input_ids"][-65:]
    with torch.no_grad():
        log_probs = tiny_model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    expected = log_probs.gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
    assert results[0]["scores"][1] == pytest.approx(expected, abs=1e-3)


def test_the_loop_evaluates_a_compiled_model_without_compiling_and_puts_training_back(fresh_model, bpe, tmp_path):
    data = tmp_path / "hellaswag.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in hellaswag_rows(10)))
    specs = [f"hellaswag:harness:8={data}", f"hellaswag={data}"]
    tasks = [prepare_task(spec, bpe, max_length=64) for spec in specs]
    expected = evaluate_tasks(fresh_model, tasks)
    assert [(row["task"], row["style"], row["n"]) for row in expected] == [
        ("hellaswag", "harness", 8),
        ("hellaswag", "completion", 10),
    ]
    graphs = []
    fresh_model.compile(backend=lambda module, _: graphs.append(module) or module.forward)
    fresh_model.train()
    assert evaluate_tasks(fresh_model, tasks) == expected
    assert graphs == []
    assert fresh_model.training
    halves = [evaluate_tasks(fresh_model, tasks, rank=r, world_size=2, gather_object=lambda own: own) for r in (0, 1)]
    assert [sum(row["n"] for row in pair) for pair in zip(*halves, strict=True)] == [8, 10]
    with pytest.raises(ValueError, match="world_size is 2: give a gather_object"):
        evaluate_tasks(fresh_model, tasks, world_size=2)


def test_accuracy_and_its_standard_error_are_those_of_the_definition():
    scores = [[-1.0, -2.0], [-3.0, -1.0], [-1.0, -4.0], [-4.0, -2.0]]
    lengths = [[1.0, 4.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    figures = accuracy(scores, [1, 1, 0, 0], lengths)
    right, right_norm = torch.tensor([0.0, 1, 1, 0]), torch.tensor([1.0, 1, 1, 0])
    assert figures["acc"] == right.mean().item()
    assert figures["acc_norm"] == right_norm.mean().item()
    assert figures["acc_stderr"] == pytest.approx(right.std().item() / 2)
    assert figures["acc_norm_stderr"] == pytest.approx(right_norm.std().item() / 2)
    assert figures["n"] == 4


def test_the_evaluate_metric_loads_offline_and_agrees(monkeypatch, tmp_path):
    evaluate = pytest.importorskip("evaluate")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    metric = evaluate.load("eval/accuracy_metric.py", cache_dir=str(tmp_path))
    scores, labels, lengths = [[-1.0, -2.0], [-3.0, -1.0, -9.0]], [0, 0], [[1, 3], [2, 2, 2]]
    computed = metric.compute(predictions=scores, references=labels, lengths=lengths)
    assert computed == accuracy(scores, labels, lengths)


GOOD = {"ctx": "the man", "endings": ["a", "b", "c", "d"], "label": 2}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**GOOD, "label": 4}, "line 2: the label is 4, expected 0 to 3"),
        ({**GOOD, "label": -1}, "line 2: the label is -1, expected 0 to 3"),
        ({**GOOD, "label": ""}, "line 2: the label is '', expected 0 to 3"),
        ({**GOOD, "endings": ["a", " ", "c", "d"]}, "line 2: choice 1 is ' ', expected text"),
        ({**GOOD, "endings": ["a"]}, "line 2: 1 choices, expected at least 2"),
        ({"ctx": "the man", "label": 0}, "line 2: hellaswag needs the field 'endings', the row has ctx, label"),
        ([1, 2], "line 2: no JSON object, but '[1, 2]'"),
        ({**GOOD, "label": 1.5}, "line 2: the label is 1.5, expected 0 to 3"),
        ({**GOOD, "label": True}, "line 2: the label is True, expected 0 to 3"),
        ({**GOOD, "label": None}, "line 2: the label is None, expected 0 to 3"),
        ({"ctx": "the man", "endings": ["a", "b"]}, "line 2: hellaswag needs the field 'label'"),
        ({**GOOD, "endings": "abcd"}, "a field of hellaswag has a value of another type ('abcd' is not a list)"),
        ({**GOOD, "endings": ["a", 2, "c", "d"]}, "line 2: a field of hellaswag has a value of another type"),
        ({**GOOD, "ctx": ["a", "b", "c", "d"]}, "line 2: a field of hellaswag has a value of another type"),
        ({**GOOD, "ctx": 5}, "line 2: a field of hellaswag has a value of another type"),
        ({**GOOD, "ctx": "a\ud800"}, r"line 2: .*'\\ud800' in position 1: surrogates not allowed"),
        ("{broken", "line 2: no JSON"),
        ('{"label": 0, "ctx": "a", "label": 1}', "('label' stands there twice)"),
        ("[" * 100_000, "line 2: no JSON"),
        ("\udcff", "line 2: no JSON"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tiny_model, bpe, tmp_path, line, message):
    data = tmp_path / "items.jsonl"
    text = json.dumps(GOOD) + "\n" + (line if isinstance(line, str) else json.dumps(line)) + "\n"
    data.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=message if ".*" in message else re.escape(message)):
        rows = read_rows("hellaswag", data=data)
        score_task(tiny_model, bpe, "hellaswag", items=rows, style="completion")


def test_an_empty_file_an_unknown_task_and_a_foreign_vocabulary_are_refused(tiny_model, bpe, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty"):
        read_rows("piqa", data=tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match="no task 'hellaswaq': there are hellaswag, piqa"):
        prepare_task("hellaswaq", bpe, max_length=64)
    with pytest.raises(ValueError, match="piqa has no style 'completion': it has harness"):
        prepare_task("piqa:completion", bpe, max_length=64)
    from transformers import GPT2Config, GPT2LMHeadModel

    for vocab_size in (len(bpe) - 1, 5000):
        foreign = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=8, n_positions=64))
        with pytest.raises(ValueError, match=f"the tokenizer has {len(bpe)} tokens and the model's embedding"):
            score_task(foreign, bpe, "hellaswag", items=[Row("row 0", GOOD)], style="completion")


def run_hellaswag(checkpoint, data, output, *, launcher=("-m",), extra=()):
    arguments = ["--model", checkpoint, "--data", data, "--output", output, "--device", "cpu", *extra]
    command = [sys.executable, *launcher, "eval.hellaswag", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_writes_figures_and_items_the_same_from_one_process_and_two(checkpoint, tmp_path):
    data = tmp_path / "items.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in hellaswag_rows(11)))
    one = run_hellaswag(checkpoint, data, tmp_path / "one" / "F.json", extra=["--style", "harness"])
    assert one.returncode == 0, one.stderr
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node=2", "-m")
    two = run_hellaswag(checkpoint, data, tmp_path / "two" / "F.json", launcher=torchrun, extra=["--style", "harness"])
    assert two.returncode == 0, two.stderr
    figures = [json.loads((tmp_path / name / "F.json").read_text()) for name in ("one", "two")]
    assert figures[0] == figures[1]
    assert set(figures[0]) >= {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "n", "style"}
    items = [
        [json.loads(line) for line in (tmp_path / name / "F.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert [item["index"] for item in items[1]] == list(range(11))
    for key in ("prediction", "prediction_norm", "label"):
        assert [item[key] for item in items[0]] == [item[key] for item in items[1]]
    assert figures[0]["dataset"] == {"path": "Rowan/hellaswag", "name": None, "split": "validation"}


QUESTION = {"question_stem": "The", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
BAD_ROWS = [
    ("piqa", {"goal": 5, "sol1": "a", "sol2": "b", "label": 0}),
    ("piqa", {"goal": "The", "sol1": ["a"], "sol2": "b", "label": 0}),
    ("openbookqa", {**QUESTION, "answerKey": "C"}),
    ("openbookqa", {**QUESTION, "choices": {"text": "ab", "label": ["A", "B"]}}),
    ("openbookqa", {**QUESTION, "choices": ["a", "b"]}),
    ("openbookqa", {**QUESTION, "question_stem": ["a", "b"]}),
    ("copa", {"premise": "A.", "choice1": "a", "choice2": "b", "question": "why", "label": 0}),
    ("winogrande", {"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"}),
    ("winogrande", {"sentence": "a _ b", "option1": "a", "option2": "b", "answer": ""}),
    ("wsc273", {"text": "a b", "pronoun": "b", "pronoun_loc": 2, "options": "xy", "label": 0}),
    ("wsc273", {"text": "a b", "pronoun": "b", "pronoun_loc": -1, "options": ["x", "y"], "label": 0}),
    ("wsc273", {"context_options": "xy", "continuation": "a", "gold": 0}),
    ("piqa", {"query": "Question: a\n", "choices": "xy", "gold": 0}),
    ("lambada_openai", {"context": ["a"], "continuation": "b"}),
]


@pytest.mark.parametrize(("task", "fields"), BAD_ROWS)
def test_a_row_of_another_form_is_named_in_every_task(task, fields):
    with pytest.raises(ValueError, match=r"^items\.jsonl, line 7: "):
        render(Row("items.jsonl, line 7", fields), task)


@pytest.mark.parametrize("output", ["t.json", "t.jsonl", "other.json", "folder.json", "new", "new.x", "link.json"])
def test_an_output_that_would_replace_a_file_of_another_kind_is_refused(
    checkpoint, tmp_path, monkeypatch, capsys, output
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jsonl").write_text(json.dumps(GOOD) + "\n")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link.json").symlink_to("t.jsonl")
    assert main(["--model", str(checkpoint), "--data", "t.jsonl", "--output", output, "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "give" in line
    assert (tmp_path / "t.jsonl").read_text() == json.dumps(GOOD) + "\n"
    assert (tmp_path / "other.json").read_text() == "{}"


def test_results_replace_earlier_results(checkpoint, tmp_path):
    (tmp_path / "items.jsonl").write_text(json.dumps(GOOD) + "\n")
    command = ["--model", str(checkpoint), "--data", str(tmp_path / "items.jsonl"), "--device", "cpu"]
    for _ in range(2):
        assert main([*command, "--output", str(tmp_path / "new" / "F.json")]) == 0
    assert json.loads((tmp_path / "new" / "F.json").read_text())["n"] == 1


def test_rows_of_the_hub_name_their_dataset_and_row(monkeypatch):
    asked = {}

    def load_dataset(**arguments):
        asked.update(arguments)
        return [{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}] * 3

    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", load_dataset)
    rows = read_rows("piqa", limit=2)
    assert asked == TASKS["piqa"].dataset and asked["path"] == "baber/piqa"
    assert [row.where for row in rows] == ["baber/piqa, row 0", "baber/piqa, row 1"]
    assert render(rows[0], "piqa").continuations == [" a", " b"]
