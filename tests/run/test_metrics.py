"""metrics.jsonl: no step twice, valid JSON in every row."""

from gpt2repro.run.metrics import MetricsLog, read_metrics


def test_a_resumed_log_drops_later_rows_and_a_line_that_a_kill_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 6):
        log.write(step, "train", loss=1.0 / step)
    log.write(3, "val", loss=0.5)
    with path.open("a") as file:
        file.write('{"step": 6, "kind": "tr')
    resumed = MetricsLog(path, step=3)
    resumed.write(4, "train", loss=9.0)
    assert [(row["step"], row["kind"]) for row in read_metrics(path)] == [
        (1, "train"), (2, "train"), (3, "train"), (3, "val"), (4, "train"),
    ]  # fmt: skip
    assert read_metrics(path)[-1]["loss"] == 9.0


def test_a_run_that_begins_anew_measures_step_0_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):  # the first was killed before its first checkpoint
        MetricsLog(path).write(0, "val", loss=6.2)
    assert [row["step"] for row in read_metrics(path)] == [0]


def test_every_row_is_json_also_where_the_loss_is_not_finite(tmp_path):
    MetricsLog(tmp_path / "metrics.jsonl").write(1, "train", loss=float("nan"), grad_norm=float("inf"), lr=0.1)
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "kind": "train", "loss": null, "grad_norm": null, "lr": 0.1}\n'
    )


def test_other_processes_than_the_main_one_write_nothing(tmp_path):
    MetricsLog(None).write(1, "train", loss=1.0)
    assert list(tmp_path.iterdir()) == []
