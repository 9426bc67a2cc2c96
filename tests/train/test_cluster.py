"""Several machines: two launchers on one machine, and the SLURM script with stand-ins for SLURM's own commands."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ENVIRONMENT, ROOT, end, wait_until
from tests.test_train import assert_same_bits

SBATCH = ROOT / "accelerate_configs" / "slurm.sbatch"
LAUNCHED = {
    **os.environ, **ENVIRONMENT, "ACCELERATE_MIXED_PRECISION": "no",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_launchers_give_what_one_gives_bitwise(unbroken_run, train_script, tmp_path):
    command = [
        "accelerate", "launch", "--config_file", str(ROOT / "accelerate_configs" / "multi_node.yaml"),
        "--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()),
        "--mixed_precision", "no",
    ]  # fmt: skip
    with socket.socket() as default:
        # Launchers that are not told the address go to port 29400 of their own machine, and would meet there. Where
        # something else has it, they cannot either.
        default.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            default.bind(("127.0.0.1", 29400))
        launchers = [
            subprocess.Popen(
                [*command, "--machine_rank", rank, str(ROOT / "train_accelerate.py"),
                 *train_script.flags(tmp_path / "run")],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=LAUNCHED,
            )
            for rank in "01"
        ]  # fmt: skip
        outputs = [end(launcher) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    assert "256 tokens a step = 2 processes x 1 micro-steps" in "".join(outputs)
    assert_same_bits(tmp_path / "run", unbroken_run)


STAND_INS = {
    "srun": """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
for SLURM_NODEID in 0 1; do
    export SLURM_NODEID
    "$@" &
    echo $! >> "$STEP"
done
wait -n; first=$?
wait -n; exit $((first > $? ? first : $?))
""",
    # Every process of the step gets the signal, as from slurmstepd: here the launchers and their ranks.
    "scancel": '#!/bin/bash\nfor pid in $(cat "$STEP"); do kill -TERM "$pid" $(pgrep -P "$pid"); done\n',
    "scontrol": '#!/bin/bash\ncase "$1" in show) echo localhost ;; *) echo "$@" >> "$STEP.q" ;; esac\n',
}


@pytest.mark.slow
def test_the_slurm_script_saves_before_the_time_limit_requeues_itself_and_resumes(train_script, tmp_path):
    (tmp_path / "bin").mkdir()
    for name, script in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    fields = {"max_steps": 400, "eval_every": 0, "save_every": 100, "mixed_precision": "auto"}
    run_dir = tmp_path / "run"

    def job(number: int) -> subprocess.Popen:
        slurm = {
            "SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "1", "STEP": str(tmp_path / f"step{number}"),
            "PATH": f"{tmp_path / 'bin'}{os.pathsep}{LAUNCHED['PATH']}",
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", str(SBATCH), *train_script.flags(run_dir, **fields)], cwd=ROOT, env={**LAUNCHED, **slurm},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    warned = job(1)
    metrics = run_dir / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size, warned)
    warned.send_signal(signal.SIGUSR2)
    output = end(warned)
    assert warned.returncode == 1, output
    assert "stopped by a signal after saving step" in output
    requeued = (tmp_path / "step1.q").read_text().split()
    assert requeued[0] == "requeue"
    again = job(2)
    output = end(again)
    assert again.returncode == 0, output
    assert "resumed from" in output
    assert not (tmp_path / "step2.q").exists()
    train_script(tmp_path / "unbroken", processes=2, **fields)
    assert_same_bits(run_dir, tmp_path / "unbroken")
