"""lm-eval through our wrapper and through its own command, on a checkpoint folder as it is."""

import json
import subprocess
import sys

import pytest

from eval.accuracy import summarise
from eval.multiple_choice import score_task
from eval.tasks import read_rows

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -c constraints.txt lm_eval")


@pytest.fixture
def own_task(tmp_path):
    """A folder with an lm-eval task over rows of our own in OpenBookQA's fields."""
    words = ["rice", "wheat", "corn", "moss", "water", "milk"]
    rows = [
        {
            "question_stem": f"The man throws {words[index % 6]} into the",
            "choices": {"text": [words[(index + k) % 6] for k in range(1, 5)], "label": list("ABCD")},
            "answerKey": "ABCD"[index % 4],
        }
        for index in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(
        f"""task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: question_stem
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
doc_to_choice: "{{{{choices.text}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
    )
    return tmp_path


@pytest.mark.parametrize("scorer", [[], ["--fast"]])
def test_wrapper_and_lm_eval_agree_with_our_scorer(checkpoint, own_task, tiny_model, bpe, scorer):
    rows = read_rows("openbookqa", data=own_task / "rows.jsonl")
    expected = summarise(score_task(tiny_model, bpe, "openbookqa", items=rows))
    command = [sys.executable, "-m", "eval.lm_harness", "--model", checkpoint, "--tasks", "own", "--device", "cpu"]
    command += ["--include-path", own_task, *scorer]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads((checkpoint / "lm_eval.json").read_text())
    assert written["lm_eval_model"] == ("gpt2repro-fast" if scorer else "hf")
    results = written["results"]["own"]
    assert results["acc,none"] == pytest.approx(expected["acc"])
    assert results["acc_norm,none"] == pytest.approx(expected["acc_norm"])
    assert results["acc_stderr,none"] == pytest.approx(expected["acc_stderr"])


@pytest.mark.slow
def test_lm_evals_own_command_reads_a_checkpoint_as_it_is(checkpoint, own_task, tiny_model, bpe, tmp_path):
    rows = read_rows("openbookqa", data=own_task / "rows.jsonl")
    expected = summarise(score_task(tiny_model, bpe, "openbookqa", items=rows))
    arguments = f"pretrained={checkpoint},trust_remote_code=True"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", "own"]
    command += ["--include_path", str(own_task), "--device", "cpu", "--output_path", str(tmp_path / "out.json")]
    # From another folder, so that only the code beside the weights can be found.
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = next(tmp_path.rglob("out*.json"))
    assert json.loads(written.read_text())["results"]["own"]["acc,none"] == pytest.approx(expected["acc"])
