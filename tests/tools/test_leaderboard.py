"""Leaderboards of result files: what is in the table and the picture, and what is refused."""

import json

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from gpt2repro.tools.leaderboard import board_table, read_board
from gpt2repro.tools.report import main
from gpt2repro.train.estimates import flops_per_token

CORE = {"task": "core", "core": 0.13, "complete": True, "tasks": {}, "n": 90_000}
HELLASWAG = {"task": "hellaswag", "style": "completion", "acc": 0.28, "acc_norm": 0.3, "n": 10_042}
VAL = {"measured_on": "data/val", "loss": 3.0, "bits_per_byte": 1.0, "tokens": 1000}


def write_result(folder, name: str, model, weights: str, result: dict) -> str:
    (folder / name).write_text(json.dumps({"model": str(model), "weights_sha256": weights, **result}))
    return str(folder / name)


@pytest.fixture
def checkpoint(tmp_path):
    """A run of 1,000,000 tokens whose checkpoint has weights of the hash aaaa."""
    shape = {"parameters": 124_439_808, "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}
    recipe = {"seq_len": 1024, "init_from": None}
    (tmp_path / "run" / "latest").mkdir(parents=True)
    record = {"recipe": recipe, "dataset": {"fingerprint": "0"}, "model": shape, "starts": []}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    state = {"step": 10, "tokens": 1_000_000, "files": {"model.safetensors": {"sha256": "aaaa"}}}
    (tmp_path / "run" / "latest" / "trainer_state.json").write_text(json.dumps(state))
    return tmp_path / "run" / "latest"


def test_files_of_the_same_weights_are_one_row_with_the_flops_of_their_run(tmp_path, checkpoint):
    files = [
        write_result(tmp_path, "v.json", checkpoint, "aaaa", VAL),
        write_result(tmp_path, "h.json", "elsewhere", "aaaa", HELLASWAG),
        write_result(tmp_path, "other.json", checkpoint, "bbbb", VAL),  # `latest` was other weights then
    ]
    board = read_board(files)
    flops = 1_000_000 * flops_per_token(
        n_parameters=124_439_808, n_positions=1024, n_layer=12, n_embd=768, seq_len=1024
    )
    assert board == {
        str(checkpoint): {
            "training FLOPs": flops, "loss, val": 3.0, "bits per byte, val": 1.0,
            "hellaswag completion, acc_norm in %, 10,042 items": 30.0,
        },
        f"{checkpoint} bbbb": {"training FLOPs": None, "loss, val": 3.0, "bits per byte, val": 1.0},
    }  # fmt: skip


def test_a_partial_core_is_not_called_core_and_has_no_marks_of_gpt2(tmp_path):
    partial = {**CORE, "complete": False, "tasks": {"copa": {}}, "n": 100}
    header, row = board_table(read_board([write_result(tmp_path, "c.json", "m", "aaaa", partial)]))
    assert header[2] == "centered accuracy of 1 tasks, 100 items" and row[2] == "0.1300"
    header, *rows = board_table(read_board([write_result(tmp_path, "c.json", "m", "aaaa", CORE)]))
    marks = ["0.1300", "0.1139", "0.1849", "0.2146", "0.2565"]
    assert header[2] == "CORE" and [row[2] for row in rows] == marks


def test_the_picture_has_a_panel_for_each_figure_and_the_dotted_marks(tmp_path, checkpoint, monkeypatch, capsys):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    files = [
        write_result(tmp_path, "v.json", checkpoint, "aaaa", VAL),
        write_result(tmp_path, "c.json", "openai-community/gpt2", "bbbb", CORE),
    ]
    assert main(["--results", *files, "--output", str(tmp_path / "board.png")]) == 0
    panels = [panel for panel in figures[0].axes if panel.get_visible()]
    assert [panel.get_title() for panel in panels] == ["loss, val", "bits per byte, val", "CORE"]
    assert {line.get_linestyle() for line in panels[2].lines} == {"-", ":"}
    texts = {text.get_text() for text in figures[0].findobj(Text)}
    assert {"GPT-2 124M, 0.1139", "GPT-2 1558M, 0.2565", str(checkpoint)} <= texts
    assert "openai-community/gpt2 (training FLOPs not known)" in texts
    assert "GPT-2 355M (nanochat)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("second", "message"),
    [({"acc": 0.3}, "holds no results"), ({"model": "m", "weights_sha256": "a", **VAL}, "another file has loss, val")],
)
def test_a_file_that_holds_no_results_or_the_same_ones_is_named(tmp_path, capsys, second, message):
    first = write_result(tmp_path, "first.json", "m", "a", VAL)
    (tmp_path / "second.json").write_text(json.dumps(second))
    assert main(["--results", first, str(tmp_path / "second.json")]) == 1
    error = capsys.readouterr().err
    assert message in error and "second.json" in error
