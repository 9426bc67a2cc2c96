"""metrics.jsonl and the trackers beside it: no step twice, valid JSON in every row."""

import pytest

from gpt2repro.recipe import Recipe
from gpt2repro.run import metrics
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


# ---- trackers ------------------------------------------------------------------------------------------------


class RecordingTracker:
    """In the place of wandb's or trackio's; `started` and `logged` are those of all starts."""

    started, logged, fails = [], [], False

    def __init__(self, project, **settings):
        self.name, self.settings = "recording", settings

    def start(self):
        if self.fails:
            raise ConnectionError("no login")
        self.started.append(self.settings)

    def store_init_configuration(self, fields):
        self.started.append(fields["seed"])

    def log(self, numbers, step):
        self.logged.append((step, numbers["train/loss"]))

    def finish(self):
        pass


@pytest.fixture
def recording(monkeypatch):
    monkeypatch.setattr(RecordingTracker, "started", [])
    monkeypatch.setattr(RecordingTracker, "logged", [])
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(metrics.LOGGER_TYPE_TO_CLASS, name, RecordingTracker)
    return RecordingTracker


def train(folder, tracker, *, first, last, loss, is_new=False):
    """Steps `first` to `last` of a run that resumed from the checkpoint before the first, and was then killed."""
    log = MetricsLog(folder / "metrics.jsonl", step=first - 1)
    log.start_trackers(
        Recipe(log_with=(tracker,)), folder=folder, run_id="0a1b2c3d", step=first - 1, is_new=is_new
    )
    for step in range(first, last + 1):
        log.write(step, "train", loss=loss)
    return log


def test_tensorboard_shows_each_step_of_a_resumed_run_once(tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, "tensorboard", first=1, last=2, loss=9.0, is_new=True)  # killed before its first checkpoint
    train(tmp_path, "tensorboard", first=1, last=6, loss=1.0)
    train(tmp_path, "tensorboard", first=4, last=8, loss=2.0).close()
    events = reading.EventAccumulator(str(tmp_path / "gpt2repro")).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(s, 1.0 if s < 4 else 2.0) for s in range(1, 9)]


@pytest.mark.parametrize(
    ("tracker", "identity"), [("wandb", {"id": "0a1b2c3d"}), ("trackio", {"name": "run-0a1b2c3d"})]
)
def test_wandb_and_trackio_resume_the_same_run_and_get_each_step_once(tmp_path, recording, tracker, identity):
    folder = tmp_path / "run"
    folder.mkdir()
    train(folder, tracker, first=1, last=6, loss=1.0, is_new=True)
    train(folder, tracker, first=4, last=8, loss=1.0)
    first, configuration, second = recording.started
    assert first == second and identity.items() < first.items() and first["resume"] == "allow"
    assert configuration == Recipe().seed  # once
    assert [step for step, _ in recording.logged] == list(range(1, 9))


def test_a_tracker_that_does_not_start_is_left_out_and_named(tmp_path, recording, monkeypatch, capsys):
    monkeypatch.setattr(recording, "fails", True)
    train(tmp_path, "wandb", first=1, last=3, loss=1.0, is_new=True).close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3 and recording.logged == []
    assert capsys.readouterr().out.count("tracker recording failed (no login): the run continues without it") == 1
