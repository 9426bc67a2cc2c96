"""What all benchmarks share: command-line options, timings taken in turns, table rows, figures as JSON."""

import argparse
import importlib.util
import itertools
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from configuration_gpt2repro import NAMED_SHAPES
from gpt2repro.train.launch import reuse_memory

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy")


class Seconds(NamedTuple):
    """What one call took. On a CPU that does other work too, the processor's time varies less than the clock's."""

    clock: float
    processor: float


def time_in_turns(ways: dict[str, Callable[[], Any]], *, rounds: int, warmup: int = 3) -> dict[str, list[Seconds]]:
    """`rounds` timings of every way, in the order A B C A B C …: other work on the machine slows all ways alike.

    A way must return its result on the host, so that no kernel still runs when its clock stops.
    """
    seconds: dict[str, list[Seconds]] = {name: [] for name in ways}
    for turn in range(warmup + rounds):
        for name, way in ways.items():
            clock, processor = time.perf_counter(), time.process_time()
            way()
            took = Seconds(time.perf_counter() - clock, time.process_time() - processor)
            if turn >= warmup:
                seconds[name].append(took)
    return seconds


def fastest(call: Callable[[], torch.Tensor], *, calls: int = 5) -> float:
    """Seconds of the fastest of a few calls, after one that is not timed."""
    times = []
    for _ in range(calls + 1):
        began = time.perf_counter()
        if call().is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def compare(seconds: dict[str, list[Seconds]], *, amount: int, unit: str) -> dict:
    """Two tables: `unit` a second of every way (median), and how many times as fast ours is as each rival.

    A ratio is that of neighbouring calls; its median and quartiles over the rounds are shown. `ours` itself is the
    rival of its own variants.
    """
    figures: dict[str, dict] = {"ways": {}, "ratios": {}}
    print_row("way", "seconds", f"{unit}/s", "processor s")
    for name, timings in seconds.items():
        clock, processor = zip(*timings, strict=True)
        rate = amount / median(clock)
        figures["ways"][name] = {f"{unit}_per_second": rate, "clock_seconds": clock, "processor_seconds": processor}
        print_row(name, f"{median(clock):.4f}", f"{rate:,.2f}", f"{median(processor):.4f}")
    print_row("ours / rival, times as fast", "median", "quartile", "quartile", "by processor")
    for ours, rival in itertools.permutations(seconds, 2):
        if ours.startswith("ours") and (rival == "ours" or not rival.startswith("ours")):
            fast, slow = np.array(seconds[ours]), np.array(seconds[rival])  # (rounds, clock and processor)
            low, middle, high = np.quantile(slow / fast, [0.25, 0.5, 0.75], axis=0).tolist()
            row = {"median": middle[0], "q1": low[0], "q3": high[0], "by_processor": middle[1]}
            figures["ratios"][f"{ours} / {rival}"] = row
            print_row(f"{ours} / {rival}", *(f"{ratio:.3f}" for ratio in row.values()))
    return figures


def load_file(path: str, what: str) -> ModuleType:
    """A single file of another project as a module; `what` names it in the error where there is no such file."""
    if not Path(path).is_file():
        raise ValueError(f"there is no {path}: give {what}")
    name = f"benchmarked_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file: give {what}")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # the compiler looks its globals up there
    spec.loader.exec_module(module)
    return module


def benchmark_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the option of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures to this file")
    return parser


def model_parser(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark of a model; reuses memory as training does on a CPU."""
    reuse_memory()
    parser = benchmark_parser(description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model-shape", default="gpt2", choices=list(NAMED_SHAPES))
    parser.add_argument("--rounds", type=int, default=rounds, help="timed calls of each way (default: %(default)s)")
    return parser


def print_row(name: str, *cells: str) -> None:
    """A row of a table: a column of names, then columns of figures."""
    print(f"{name:38}" + "".join(f"{cell:>13}" for cell in cells), flush=True)


def finish(arguments: argparse.Namespace, figures: dict) -> None:
    """Print the figures, the settings and the machine as one line of JSON; --json writes them to a file too."""
    settings = {name: value for name, value in vars(arguments).items() if name != "json"}
    record = {"settings": settings, **figures, "machine": machine(settings.get("device", "cpu"))}
    print(json.dumps(record, default=str))
    if arguments.json:
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")


def machine(device: str = "cpu") -> dict:
    """Commit, hardware and versions."""
    status, commit = subprocess.getstatusoutput(f"git -C {shlex.quote(str(ROOT))} rev-parse --short HEAD")
    cuda = torch.device(device).type == "cuda"
    return {
        "commit": commit if status == 0 else "unknown",
        "hardware": torch.cuda.get_device_name(device) if cuda else _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "cuda": torch.version.cuda if cuda else None,
    }


def _processor_name() -> str:
    file = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", file.read_text()) if file.exists() else None
    return match[1].strip() if match else platform.machine()
