"""What a run measures: metrics.jsonl, tokens a second, model FLOPs utilisation, memory."""

import json
import math
import os
import resource
import sys
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import GeneralTracker

# Dense bf16 tensor-core peaks in FLOP/s, by a part of the device's name; NVIDIA's datasheets and whitepapers. The
# more particular name stands first.
PEAK_FLOPS = {
    "H200": 989.4e12,
    "H100 PCIe": 756.0e12,
    "H100 NVL": 835.0e12,
    "H100": 989.4e12,
    "A100": 312.0e12,
    "L40S": 362.0e12,
    "L4": 121.0e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71.0e12,
}


def flops_per_token(*, n_parameters: int, n_positions: int, n_layer: int, n_embd: int, seq_len: int) -> int:
    """Model FLOPs of forward and backward for a token: 6 (N - wpe) + 12 * n_layer * n_embd * T.

    Source: PaLM paper, appendix B. The position table is looked up, not multiplied, so it does not count; the token
    embedding does, as the tied head. GPT-2 124M at T = 1024: 855,166,464.
    """
    return 6 * (n_parameters - n_positions * n_embd) + 12 * n_layer * n_embd * seq_len


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None for a device that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held so far: of the card's on CUDA, else resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


class MetricsLog:
    """metrics.jsonl, the record of a run: a row is {"step", "kind": train / val / sample / …, …}.

    Opening it for a resumed run drops the rows after `step`, so that no step stands in it twice, and lines that a kill
    cut off. On every process but the main one (`path` None) it writes nothing. `trackers` are Accelerate's, which get
    the numbers of every row as `kind/name` (`eval/TASK/name`).
    """

    def __init__(self, path: Path | None, *, step: int = 0, trackers: Sequence[GeneralTracker] = ()) -> None:
        self._file: FileIO | None = None
        self.trackers = trackers
        if path is None:
            return
        # Without a checkpoint a run begins anew, and with it what was measured before its first step.
        kept = [row for row in read_metrics(path) if row["step"] <= step] if step else []
        aside = path.with_name(f".{path.name}.tmp")
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(aside, path)
        self._file = FileIO(path, "a")  # no buffer: after an error nothing is left to be written at the exit

    def write(self, step: int, kind: str, **values: Any) -> None:
        """One row, flushed at once; a number that is not finite becomes null, which JSON can say.

        Raises:
            ValueError: the row cannot be written.
        """
        if self._file:
            values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            row = (json.dumps({"step": step, "kind": kind, **values}) + "\n").encode()
            try:
                while row:  # a full disk takes a part and refuses the rest
                    row = row[self._file.write(row) :]
            except OSError as error:
                raise ValueError(
                    f"{self._file.name} cannot be written ({error.strerror}); the checkpoints are untouched: "
                    "make room and run the same command again"
                ) from error
            prefix = f"{kind}/{values['task']}" if "task" in values else kind
            numbers = {f"{prefix}/{k}": v for k, v in values.items() if isinstance(v, (int, float))}
            for tracker in self.trackers if numbers else ():
                tracker.log(numbers, step=step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, none where there is no such file.

    A line that is no row, as a kill or a full disk leaves one, is left out.
    """
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.keys() >= {"step", "kind"}:
            rows.append(row)
    return rows
