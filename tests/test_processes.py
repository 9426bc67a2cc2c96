"""Two processes at the start of a run: one has another recipe, or never comes to the first collective."""

from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture
def other_on_process_1(tmp_path):
    """The script, with some code of its own on process 1."""

    def write(code: str) -> Path:
        script = tmp_path / "other.py"
        script.write_text(
            "import os, sys, time\n"
            f"sys.path.insert(0, {str(ROOT)!r})\n"
            "import train_accelerate\n"
            f"if os.environ['RANK'] == '1':\n    {code}\n"
            "sys.exit(train_accelerate.main())\n"
        )
        return script

    return write


def test_a_process_with_another_recipe_is_an_error_before_anything_is_opened(
    train_script, other_on_process_1, tmp_path
):
    script = other_on_process_1("sys.argv += ['--learning_rate', '0.5']")
    output = train_script(tmp_path / "run", processes=2, script=script, exit_code=1, dataset_dir="nowhere")
    assert "process 1 has a recipe that process 0 has not: give both the same" in output
    assert not (tmp_path / "run").exists()


def test_a_process_that_never_comes_to_the_first_collective_ends_the_run_and_all_say_where_they_are(
    train_script, other_on_process_1, tmp_path
):
    script = other_on_process_1("train_accelerate.processes.check_same = lambda *arguments: time.sleep(1000)")
    output = train_script(tmp_path / "run", processes=2, script=script, exit_code=1, watchdog_minutes=0.25)
    assert "error on process 1: no progress for 0.25 minutes, in step 1, at:" in output
    assert "error on process 0: no progress for 0.25 minutes, in step 1, at:" in output
    assert " check_same" in output
