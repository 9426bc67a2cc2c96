"""What a run reports: rows of metrics.jsonl, numbers for the trackers, lines on the terminal."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tqdm import tqdm

from gpt2repro.command import discard_output
from gpt2repro.recipe import Recipe

PROJECT = "gpt2repro"  # of the trackers
SECONDS_BETWEEN_LINES = 10.0  # of training steps, where standard error is no terminal


class MetricsLog:
    """metrics.jsonl, the record of a run: a row is {"step", "kind": train / val / sample / …, …}.

    Opening it for a resumed run drops the rows after `step`, so that no step stands in it twice, and lines that a kill
    cut off. On every process but the main one (`path` None) it writes nothing. `trackers` are Accelerate's, which get
    the numbers of every row as `kind/name` (`eval/TASK/name`). A row of training steps moves the bar on a terminal; in
    a log it is a line now and then.
    """

    def __init__(
        self, path: Path | None, *, step: int = 0, max_steps: int = 0, trackers: Sequence[GeneralTracker] = ()
    ) -> None:
        self._file: FileIO | None = None
        self.trackers = trackers
        self._bar = tqdm(total=max_steps, initial=step, unit="step", disable=None if path and max_steps else True)
        self._shown, self._max_steps = -math.inf, max_steps
        if path is None:
            return
        rows = read_metrics(path)
        # Without a checkpoint a run begins anew, and with it what was measured before its first step.
        kept = [row for row in rows if row["step"] <= step] if step else []
        self._trackers_have = max((row["step"] for row in rows if not step or row["step"] > step), default=-1)
        aside = path.with_name(f".{path.name}.tmp")
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(aside, path)
        self._file = FileIO(path, "a")  # no buffer: after an error nothing is left to be written at the exit

    def start_trackers(self, recipe: Recipe, *, folder: Path, run_id: str, step: int, is_new: bool) -> None:
        """Start the trackers of `log_with`; those of a run that is not new resume it after `step`.

        TensorBoard deletes the later steps. wandb, which finds the run by its id, and trackio, by its name, keep them,
        and are not sent them again.
        """
        settings: dict[str, dict[str, Any]] = {
            "tensorboard": {"logging_dir": folder, "purge_step": step + 1 if step else 0},
            "wandb": {"name": folder.name, "id": run_id, "resume": "allow"},
            "trackio": {"name": f"{folder.name}-{run_id}", "resume": "allow"},
        }
        fields = {name: v if isinstance(v, (int, float, str)) else str(v) for name, v in asdict(recipe).items()}

        def start(tracker: GeneralTracker) -> None:
            tracker.start()
            if is_new:
                tracker.store_init_configuration(fields)

        self.trackers = [LOGGER_TYPE_TO_CLASS[name](PROJECT, **settings[name]) for name in recipe.log_with]
        for tracker in self.trackers:
            self._ask(tracker, start)

    def write(self, step: int, kind: str, **values: Any) -> None:
        """One row, flushed at once; a number that is not finite becomes null, which JSON can say.

        Raises:
            ValueError: the row cannot be written.
        """
        if self._file is None:
            return
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
        prefix = "/".join([kind, *(values[name] for name in ("task", "source") if name in values)])
        numbers = {f"{prefix}/{k}": v for k, v in values.items() if isinstance(v, (int, float))}
        for tracker in self.trackers if numbers else ():
            if step > self._trackers_have or tracker.name == "tensorboard":
                self._ask(tracker, lambda tracker: tracker.log(numbers, step=step))
        self._show(step, kind, values)

    def show(self, text: str) -> None:
        """Lines on standard output, above the bar. A run outlives its terminal."""
        if self._file is not None:
            try:
                tqdm.write(text)
                sys.stdout.flush()
            except (OSError, ValueError):  # closed, or the disk of a log is full
                discard_output()

    def close(self) -> None:
        """The end of the run: the bar and the trackers are finished."""
        self._bar.close()
        for tracker in self.trackers:
            self._ask(tracker, lambda tracker: tracker.finish())

    def _ask(self, tracker: GeneralTracker, action: Callable[[GeneralTracker], Any]) -> None:
        """Do `action` with a tracker. One that fails is left out from then on, and the run says so once."""
        try:
            action(tracker)
        except Exception as error:  # of the tracker's network, disk or login
            self.trackers = [other for other in self.trackers if other is not tracker]
            self.show(f"tracker {tracker.name} failed ({error}): the run continues without it")

    def _show(self, step: int, kind: str, values: dict[str, Any]) -> None:
        if kind == "train":
            speed = values.get("tokens_per_second", 0)
            line = f"loss {values['loss'] or math.nan:.4f}, {speed:,.0f} tokens/s"
            self._bar.set_postfix_str(line, refresh=False)
            self._bar.update()
            if not self._bar.disable or time.monotonic() - self._shown < SECONDS_BETWEEN_LINES:
                return
            self._shown = time.monotonic()
            tokens_left = values.get("tokens", 0) / step * (self._max_steps - step)
            lines = [f"{line}, {tokens_left / speed / 60:,.1f} minutes left" if speed else line]
        else:
            lines = row_text(kind, values)
        for line in lines:
            self.show(f"step {step:>6}  {line}")


def row_text(kind: str, values: dict[str, Any]) -> list[str]:
    """A row of metrics.jsonl as lines for a person."""
    match kind:
        case "val" | "val_ema":
            loss = math.nan if values["loss"] is None else values["loss"]
            of = " of the averaged weights" if kind == "val_ema" else ""
            bits = values.get("bits_per_byte")
            per_byte = "" if bits is None else f", {bits:.4f} bits per byte"
            return [f"validation loss{of} {loss:.4f}, perplexity {math.exp(min(loss, 700.0)):,.1f}{per_byte}"]
        case "val_source" | "val_ema_source":
            loss = math.nan if values["loss"] is None else values["loss"]
            seen = f"{values['tokens']:,} tokens, {values['epochs']:.2f} epochs"
            return [f"  on {values['source']}: {loss:.4f} after {seen}"]
        case "eval":
            figures = {name: value for name, value in values.items() if isinstance(value, (int, float, str))}
            return [", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())]
        case "sample":
            return [f"sample: {' '.join(text.split())}" for text in values["texts"]]
        case "checkpoint":
            return [f"saved in {values['seconds']:.1f} s"]
        case "push" | "mirror":
            outcome = f"to {values['url']}" if "url" in values else f"failed: {values['error']}"
            return [f"{kind} of step {values['checkpoint_step']} {outcome}"]
        case "overflow":
            return [f"not applied: the gradients overflow fp16, the loss scale falls to {values['loss_scale']:g}"]
        case "bad_step":
            return [f"not applied: {values['reason']}"]
        case "warning":
            return [f"warning: {values['text']}"]
    return []


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
        if isinstance(row, dict) and type(row.get("step")) is int and isinstance(row.get("kind"), str):
            rows.append(row)
    return rows
