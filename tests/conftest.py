"""What all tests share: real data where it is present, a small prepared dataset, and a way to run the script."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

import tests.strict.sitecustomize  # noqa: F401 (a deprecation of what our own files call is an error)

ROOT = Path(__file__).resolve().parent.parent
# The same in every process that a test starts.
STRICT = str(ROOT / "tests" / "strict")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [STRICT, os.environ.get("PYTHONPATH")]))
SCRIPT = ROOT / "train_accelerate.py"
PAUSING_SCRIPT = ROOT / "tests" / "pausing_script.py"
CONFIGS = ROOT / "accelerate_configs"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with gpt2_tokenizer, tinyshakespeare, eval and corpus; the test is skipped where there is none."""
    shared = Path(os.environ.get("GPT2REPRO_SHARED", ROOT.parent / "shared")) / "data"
    if not shared.is_dir():
        pytest.skip(f"no real data at {shared}: set GPT2REPRO_SHARED to the folder that holds data/")
    return shared


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> Path:
    """The documentation of this Python, prepared with a byte-level BPE of 512 entries."""
    from gpt2repro.data.prepare import prepare

    return prepare(source="python-docs", tokenizer="train:512", out=tmp_path_factory.mktemp("data") / "python-docs")


# Two layers of 32 channels: a whole run takes seconds, most of them for imports.
TINY = {
    "model": "demo", "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "seq_len": 32,
    "global_batch_tokens": 256, "micro_batch_size": 4, "max_steps": 8, "warmup_steps": 2, "learning_rate": 3e-3,
    "eval_every": 4, "eval_tokens": 1024, "sample_every": 0, "save_every": 3, "mixed_precision": "no",
}  # fmt: skip


# Tests that were started in the background or under nohup ignore signals, and so would the runs that they start.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # so that bits compare
    "ACCELERATE_USE_CPU": "true",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300",  # seconds in which its ranks must end; 30 are few on a busy machine
}


class TrainScript:
    """train_accelerate.py on the tiny dataset, in a process of its own."""

    def __init__(self, dataset: Path) -> None:
        self.dataset = dataset

    def flags(self, output_dir: Path, **fields) -> list[str]:
        """The command line of a run with `fields` of the recipe changed."""
        recipe = {**TINY, "dataset_dir": self.dataset, "output_dir": output_dir, **fields}
        several = {name: value if isinstance(value, tuple) else (value,) for name, value in recipe.items()}
        return [word for name, values in several.items() for word in (f"--{name}", *map(str, values))]

    def start(
        self, output_dir: Path, *, processes: int = 1, config: Path = CONFIGS / "cpu_2proc.yaml",
        launcher: Sequence[str] = (), script: Path = SCRIPT, env: dict | None = None, **fields,
    ) -> subprocess.Popen:  # fmt: skip
        """The script, started, several processes by `launcher`; standard output and error come together."""
        if processes > 1 and not launcher:
            launcher = ["accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(processes),
                        "--main_process_port", "0"]  # fmt: skip
        command = [sys.executable, *(["-m", *launcher] if launcher else []), str(script)]
        return subprocess.Popen(
            [*command, *self.flags(output_dir, **fields)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, **ENVIRONMENT, **(env or {})},
        )  # fmt: skip

    def start_paused(self, output_dir: Path, place: str, *, processes: int = 1, **settings) -> subprocess.Popen:
        """The script, started, after all its processes have paused at `place`; see pausing_script.py."""
        pause_at = self._pause_at(output_dir)
        paused = [Path(f"{pause_at}.{rank}") for rank in range(processes)]
        for file in paused:
            file.unlink(missing_ok=True)
        pause_at.write_text(place)
        env = {"PAUSE_AT": str(pause_at)}
        process = self.start(output_dir, processes=processes, script=PAUSING_SCRIPT, env=env, **settings)
        wait_until(lambda: all(file.exists() for file in paused), process)
        return process

    def proceed(self, output_dir: Path) -> None:
        """Let a paused run continue."""
        self._pause_at(output_dir).unlink()

    def _pause_at(self, output_dir: Path) -> Path:
        return output_dir.with_name(f"{output_dir.name}.pause")

    def __call__(self, output_dir: Path, *, exit_code: int = 0, **settings) -> str:
        """A whole run; returns what it printed."""
        process = self.start(output_dir, **settings)
        output = end(process)
        assert process.returncode == exit_code, output
        return output


def wait_until(condition: Callable[[], object], process: subprocess.Popen) -> None:
    """Return when `condition` holds; it must hold while the process is alive."""
    deadline = time.monotonic() + 600
    while True:
        over = process.poll() is not None or time.monotonic() > deadline
        if condition():
            return
        if over:
            kill(process)
            raise AssertionError(process.communicate()[0])
        time.sleep(0.01)


def end(process: subprocess.Popen, *, seconds: float = 600) -> str:
    """Everything that a process prints until it ends, which must be within `seconds`."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        kill(process)
        raise


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the process and all that it started."""
    started = []
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


@pytest.fixture(scope="session")
def train_script(tiny_dataset) -> TrainScript:
    return TrainScript(tiny_dataset)


@pytest.fixture(scope="session")
def unbroken_run(train_script, tmp_path_factory) -> Path:
    """The folder of a tiny uninterrupted run of one process: 8 steps of 2 micro-steps of 4 sequences.

    Its output is in unbroken.log beside it.
    """
    run_dir = tmp_path_factory.mktemp("runs") / "unbroken"
    run_dir.with_suffix(".log").write_text(train_script(run_dir))
    return run_dir


def train_rows(run_dir: Path, kind: str = "train") -> dict[int, dict]:
    """The rows of one kind in a run's metrics, by step; a step with two rows is a failure."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == kind]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: row for row in rows}
