"""What the benchmarks share: timings in turns, the machine's record, rows of a table, figures as JSON."""

import argparse
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import torch


class Seconds(NamedTuple):
    """What one turn took. On a machine with other work the processor's time is the steadier figure of a CPU."""

    clock: float
    processor: float


def time_in_turns(
    ways: dict[str, Callable[[], Any]], *, rounds: int, warmup: int = 3
) -> tuple[dict[str, list[Seconds]], dict[str, Any]]:
    """`rounds` timings of every way, A B C A B C …, and what each returned last.

    Whatever else the machine does falls on all of them alike. What a way returns must lie on the host, so that
    nothing is left running when its clock stops.
    """
    seconds: dict[str, list[Seconds]] = {name: [] for name in ways}
    results = {}
    for turn in range(warmup + rounds):
        for name, way in ways.items():
            clock, processor = time.perf_counter(), time.process_time()
            results[name] = way()
            took = Seconds(time.perf_counter() - clock, time.process_time() - processor)
            if turn >= warmup:
                seconds[name].append(took)
    return seconds, results


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "q1": low, "q3": high}


def machine(device: torch.device | str = "cpu") -> dict:
    """Commit, hardware and versions: what every result names."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except FileNotFoundError:  # no git on the machine
        commit = ""
    cuda = torch.device(device).type == "cuda"
    packages = ("torch", "transformers", "accelerate", "safetensors", "numpy")
    return {
        "commit": commit or "unknown",
        "hardware": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "cuda": torch.version.cuda if cuda else None,
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else None
    return found[1].strip() if found else platform.machine()


def command_line(description: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures to this file")
    return parser


def print_row(name: str, *cells: str) -> None:
    """A row of a table: a column of names, then columns of figures."""
    print(f"{name:38}" + "".join(f"{cell:>13}" for cell in cells), flush=True)


def finish(figures: dict, json_file: str | None) -> None:
    """The figures as the last line on standard output, for machines, and in a file where one is asked for."""
    print(json.dumps(figures))
    if json_file:
        Path(json_file).parent.mkdir(parents=True, exist_ok=True)
        Path(json_file).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
