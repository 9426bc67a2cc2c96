"""Every task against lm-eval's `hf` model on the same weights: the same tokens, scores and predictions, item for item.

lm-eval runs its own task definitions; only the place of the rows differs: they come from local files, put back into
the fields of the Hub's datasets.
"""

import json
import os.path
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from configuration_gpt2repro import GPT2ReproConfig
from eval.accuracy import summarise
from eval.multiple_choice import score_task
from eval.tasks import Row, read_rows
from modeling_gpt2repro import GPT2ReproForCausalLM

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -c constraints.txt lm_eval")


def piqa(row):
    goal = row["query"].removeprefix("Question: ").removesuffix("\n")
    return {"goal": goal, "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["gold"]}


def arc(row):
    letters = list("ABCDE"[: len(row["choices"])])
    choices = {"text": row["choices"], "label": letters}
    return {"question": row["query"].removeprefix("Question: "), "choices": choices, "answerKey": letters[row["gold"]]}


def openbookqa(row):
    return {"question_stem": row["query"], **{k: v for k, v in arc(row).items() if k != "question"}}


def copa(row):
    premise, connector = row["query"].rsplit(" ", 1)
    choices = [choice[0].upper() + choice[1:] for choice in row["choices"]]
    question = {"because": "cause", "therefore": "effect"}[connector]
    return {
        "premise": f"{premise}.",  # lm-eval drops the last character
        "choice1": choices[0],
        "choice2": choices[1],
        "question": question,
        "label": row["gold"],
    }


def boolq(row):
    passage, question = row["query"].removeprefix("Passage: ").rsplit("\nQuestion: ", 1)
    return {"passage": passage, "question": question.removesuffix("?"), "label": row["gold"]}


def winogrande(row):
    before = os.path.commonprefix(row["context_options"])  # noqa: RUF071 (of strings)
    options = [context[len(before) :] for context in row["context_options"]]
    return {
        "sentence": f"{before}_ {row['continuation']}",
        "option1": options[0],
        "option2": options[1],
        "answer": str(row["gold"] + 1),
    }


def wsc273(row):
    before = os.path.commonprefix(row["context_options"])  # noqa: RUF071 (of strings)
    before = before[: before.rfind(" ") + 1]
    options = [context[len(before) :] for context in row["context_options"]]
    return {
        "text": f"{before}they {row['continuation']}",
        "pronoun": "they",
        "pronoun_loc": len(before),
        "options": options,
        "label": row["gold"],
    }


def lambada_openai(row):
    return {"text": f"{row['context']} {row['continuation']}"}


# task: (folder of the rows, lm-eval's own definition, its split, how a row gets the Hub's fields back)
TASKS = {
    "hellaswag": ("hellaswag", "hellaswag/hellaswag.yaml", "validation", dict),
    "piqa": ("piqa", "piqa/piqa.yaml", "validation", piqa),
    "arc_easy": ("arc_easy", "arc/arc_easy.yaml", "test", arc),
    "arc_challenge": ("arc_challenge", "arc/arc_challenge.yaml", "test", arc),
    "openbookqa": ("openbook_qa", "openbookqa/openbookqa.yaml", "test", openbookqa),
    "copa": ("copa", "super_glue/copa/default.yaml", "validation", copa),
    "winogrande": ("winogrande", "winogrande/default.yaml", "validation", winogrande),
    "wsc273": ("winograd_wsc", "wsc273/default.yaml", "test", wsc273),
    "boolq": ("boolq", "super_glue/boolq/default.yaml", "validation", boolq),
    "lambada_openai": ("lambada_openai", "lambada/lambada_openai.yaml", "test", lambada_openai),
}
SAME_CONTINUATION = ("winogrande", "wsc273")  # lm-eval's acc_norm would divide by the lengths of the contexts


def hub_rows(task: str, shared_dir: Path, limit: int | None) -> list[dict]:
    folder, _, _, to_hub = TASKS[task]
    return [
        to_hub(row.fields) for row in read_rows(task, data=shared_dir / "eval" / folder / "data.jsonl", limit=limit)
    ]


def run_lm_eval(model, tokenizer, rows: list[dict], task: str, folder: Path, *, batch_size: int) -> list[dict]:
    """lm-eval's samples of one task over `rows`, in their order."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    _, definition, split, _ = TASKS[task]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines = [
        f"include: {Path(lm_eval.__file__).parent / 'tasks' / definition}",
        f"task: local_{task}",
        "dataset_path: json",
        "dataset_name: null",
        f"dataset_kwargs: {{data_files: {{{split}: {folder / 'rows.jsonl'}}}}}",
        "training_split: null",
        *(f"{name}_split: {split if name == split else 'null'}" for name in ("validation", "test")),
    ]
    if task != "lambada_openai":
        metrics = [
            f"  - {{metric: {name}, aggregation: mean, higher_is_better: true}}" for name in ("acc", "acc_norm")
        ]
        lines += ["metric_list:", *metrics]
    (folder / "task.yaml").write_text("\n".join(lines) + "\n")
    outcome = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device)),
        tasks=[f"local_{task}"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    return sorted(outcome["samples"][f"local_{task}"], key=lambda sample: sample["doc_id"])


def assert_equal_item_for_item(model, tokenizer, shared_dir, task, folder, *, limit, batch_size=16) -> dict:
    data = shared_dir / "eval" / TASKS[task][0] / "data.jsonl"
    own = score_task(model, tokenizer, task, items=read_rows(task, data=data, limit=limit), style="harness")
    own.sort(key=lambda result: result["index"])
    rows = hub_rows(task, shared_dir, limit)
    reference = run_lm_eval(model, tokenizer, rows, task, folder, batch_size=batch_size)
    assert len(own) == len(reference) == len(rows)
    apart = 0.0
    for mine, theirs in zip(own, reference, strict=True):
        scores = [response[0][0] for response in theirs["resps"]]
        tokens = [len(tokenizer(argument[1])["input_ids"]) for argument in argument_pairs(theirs)]
        differences = [abs(a - b) / n for a, b, n in zip(mine["scores"], scores, tokens, strict=True)]
        apart = max(apart, *differences)
        assert max(differences) < 1e-4, theirs["doc"]  # nats per token
        assert float(mine["prediction"] == mine["label"]) == theirs["acc"], theirs["doc"]
        if task == "lambada_openai":
            continue
        assert mine["prediction"] == int(np.argmax(scores)), theirs["doc"]
        if task not in SAME_CONTINUATION:
            assert float(mine["prediction_norm"] == mine["label"]) == theirs["acc_norm"], theirs["doc"]
    return {"task": task, "max_difference_per_token": apart, **summarise(own)}


def argument_pairs(sample: dict) -> list[tuple[str, str]]:
    """The (context, continuation) pairs that lm-eval scored."""
    arguments = sample["arguments"]
    return [tuple(arguments[key].values()) for key in arguments] if isinstance(arguments, dict) else arguments


def small_model(name: str, vocab_size: int, *, n_layer=2, n_head=2, n_embd=64, n_positions=1024):
    torch.manual_seed(0)
    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "n_positions": n_positions}
    if name == "gpt2repro":
        config = GPT2ReproConfig(vocab_size=vocab_size, initializer_range=0.2, **shape)
        return GPT2ReproForCausalLM(config).eval()
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, initializer_range=0.2, **shape)).eval()


@pytest.mark.parametrize("task", TASKS)
def test_predictions_and_scores_equal_lm_eval_item_for_item(task, shared_dir, gpt2_tokenizer, tmp_path):
    model = small_model("gpt2repro", len(gpt2_tokenizer))
    limit = 8 if task == "boolq" else 24  # its passages are long
    assert_equal_item_for_item(model, gpt2_tokenizer, shared_dir, task, tmp_path, limit=limit)


def test_stock_gpt2_and_truncated_items_equal_lm_eval_too(shared_dir, gpt2_tokenizer, tmp_path):
    model = small_model("gpt2", len(gpt2_tokenizer), n_positions=64)
    figures = assert_equal_item_for_item(model, gpt2_tokenizer, shared_dir, "hellaswag", tmp_path, limit=24)
    assert 0 < figures["truncated"] < 24


@pytest.mark.parametrize("task", TASKS)
def test_rows_with_the_fields_of_the_hub_give_the_same_items(task, shared_dir, gpt2_tokenizer):
    from eval.tasks import render

    data = shared_dir / "eval" / TASKS[task][0] / "data.jsonl"
    for row, fields in zip(read_rows(task, data=data), hub_rows(task, shared_dir, None), strict=True):
        assert render(Row(row.where, fields), task, "harness") == render(row, task, "harness")


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("which", ["gpt2repro", "gpt2"])
def test_whole_sets_equal_lm_eval_item_for_item(which, task, shared_dir, gpt2_tokenizer, tmp_path, capsys):
    model = small_model(which, len(gpt2_tokenizer), n_layer=4, n_head=4, n_embd=128)
    figures = assert_equal_item_for_item(model, gpt2_tokenizer, shared_dir, task, tmp_path, limit=None)
    with capsys.disabled():
        print(which, json.dumps(figures))


def test_a_saved_checkpoint_scores_as_the_model_in_memory(shared_dir, gpt2_tokenizer, tmp_path):
    model = small_model("gpt2repro", len(gpt2_tokenizer))
    model.save_pretrained(tmp_path)
    rows = read_rows("piqa", data=shared_dir / "eval" / "piqa" / "data.jsonl", limit=8)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert score_task(loaded, gpt2_tokenizer, "piqa", items=rows) == score_task(
        model, gpt2_tokenizer, "piqa", items=rows
    )
