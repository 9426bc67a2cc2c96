"""`gpt2repro-fast` against lm-eval's `hf` model on the same weights: requests of every kind, and its own command."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -c constraints.txt lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from eval.lm_eval_model import FastLM

# lm-eval 0.4.13 gives a target the logits of another place where a longer target of another request ends at the same
# token ("the ball" + " is red", "the ball is" + " red"), unless its cache of logits is off.
REFERENCE = {"logits_cache": False}
WORDS = "the man holds a ball against his neck and throws it far then stirs milk into the bowl".split()


@pytest.fixture(scope="module")
def llama(bpe):
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    config = LlamaConfig(vocab_size=len(bpe), initializer_range=0.3, max_position_embeddings=64, **shape)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory):
    """A folder with tasks of every kind over local rows: with no, fixed or drawn examples; likelihoods and text."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": " ".join(WORDS[n % 7 : n % 7 + 2 + n % 5]),
            "choices": [" ".join(WORDS[(n + k) % 11 : (n + k) % 11 + 1 + (n * k) % 4]) for k in range(4)],
            "answer": n % 4,
            "text": " ".join(WORDS[k % 17] for k in range(n, n + 3 + 25 * (n % 5))),
        }
        for n in range(16)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\ntest_split: test\n"
    choice = data + (
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_target: answer\n'
        'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_mutual_info}]\n'
    )
    letters = choice.replace('"{{choices}}"', "[A, B, C, D]").replace(", {metric: acc_mutual_info}", "")
    examples = "num_fewshot: 3\nfewshot_split: test\nfewshot_config: {sampler: %s}\n"
    perplexity = "[{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]"
    rolling = f'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: text\nmetric_list: {perplexity}\n'
    generation = (
        'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{choices[0]}}"\n'
        'generation_kwargs: {until: ["."], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n'
    )
    tasks = {
        "own_choice": choice, "own_letters": letters, "own_first": letters + examples % "first_n",
        "own_drawn": choice + examples % "default", "own_rolling": data + rolling, "own_text": data + generation,
    }  # fmt: skip
    for name, text in tasks.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{text}")
    return folder


@pytest.mark.parametrize("which", ["tiny_model", "stock_model", "llama"])
def test_every_request_of_every_task_has_the_answer_of_lm_evals_hf_model(request, which, bpe, own_tasks):
    model = request.getfixturevalue(which)
    tasks = sorted(path.stem for path in own_tasks.glob("*.yaml"))
    manager = TaskManager(include_path=str(own_tasks), include_defaults=False)
    options = {"task_manager": manager, "bootstrap_iters": 0, "limit": 14}
    ours, theirs = (
        simple_evaluate(kind(pretrained=model, tokenizer=bpe, batch_size=4, **REFERENCE), tasks=tasks, **options)
        for kind in (FastLM, HFLM)
    )
    assert len(ours["samples"]) == 6
    for task, samples in theirs["samples"].items():
        for own, expected in zip(ours["samples"][task], samples, strict=True):
            assert own["arguments"] == expected["arguments"]
            # A response is a text, a log-likelihood, or a log-likelihood and whether greedy decoding gives it.
            for (response,), (reference,) in zip(own["resps"], expected["resps"], strict=True):
                assert response == (reference if task == "own_text" else pytest.approx(reference, abs=1e-4))
        figures = {metric: value for metric, value in theirs["results"][task].items() if isinstance(value, float)}
        assert {metric: ours["results"][task][metric] for metric in figures} == pytest.approx(figures, rel=1e-5)


def test_an_empty_context_and_a_long_one_are_scored_as_by_lm_eval(tiny_model, bpe):
    pairs = [("", "the man"), ("", " milk"), ("the man holds " * 30, "the ball"), ("the man ", " milk"), ("a", "b")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    ours, theirs = (
        kind(pretrained=tiny_model, tokenizer=bpe).loglikelihood(requests, disable_tqdm=True)
        for kind in (FastLM, HFLM)
    )
    for own, expected in zip(ours, theirs, strict=True):
        assert own[0] == pytest.approx(expected[0], abs=1e-4) and own[1] == expected[1]


def test_a_continuation_that_is_greedy_decoding_says_so(tiny_model, bpe):
    kinds = (FastLM, HFLM)
    context = "The man holds the ball"
    written = tiny_model.generate(**bpe(context, return_tensors="pt"), max_new_tokens=1, do_sample=False)
    pairs = [(context, bpe.decode([token])) for token in (written[0, -1].item(), 70)]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    for kind in kinds:
        answers = kind(pretrained=tiny_model, tokenizer=bpe).loglikelihood(requests, disable_tqdm=True)
        assert [greedy for _, greedy in answers] == [True, False]


@pytest.mark.slow
def test_lm_evals_own_command_takes_the_model_by_its_name(checkpoint, own_tasks, tmp_path):
    figures = []
    for module, model in (("eval.lm_eval_model", "gpt2repro-fast"), ("eval.lm_eval_model", "hf")):
        command = [sys.executable, "-m", module, "--model", model, "--model_args", f"pretrained={checkpoint}"]
        command += ["--tasks", "own_drawn", "--include_path", own_tasks, "--device", "cpu"]
        command += ["--output_path", tmp_path / model / "out.json"]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        written = next((tmp_path / model).rglob("out*.json"))
        figures.append(json.loads(written.read_text())["results"]["own_drawn"])
    assert figures[0] == pytest.approx(figures[1])
