"""Checkpoints: a folder that is at once a Transformers checkpoint and a resumable state; written whole or not at all.

    runs/NAME/step-00005000/   config.json, generation_config.json, model.safetensors, tokenizer, our two files,
                               optimizer.safetensors (by parameter name), trainer_state.json (the completion record);
                               with `ema_decay` model.ema.safetensors, which from_pretrained(…, variant="ema") loads
    runs/NAME/latest           a link to the newest, a file with its name where links are refused
    runs/NAME/best             with `patience`, a link to the one of the lowest validation loss, which is not deleted

A checkpoint is written to a hidden folder, synced to the disk and renamed; older ones are deleted only after that. So
a step-… folder that is not whole was damaged later, and resume says so instead of passing it over. Nothing in it is a
pickle. The files are the same whether one process trained, several (DDP), or several with a shard of every tensor each
(FSDP2), so any of them resumes from any.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from gpt2repro.files import file_sha256, link_to, linked, seal, sync
from gpt2repro.processes import on_main_process, unsharded

RECORD = "trainer_state.json"
OPTIMIZER, AVERAGE = "optimizer.safetensors", "model.ema.safetensors"
FORMAT_VERSION = 1


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    tokenizer: Any,
    accelerator: Accelerator,
    state: dict[str, Any],
    keep_last: int,
    keep_every: int = 0,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Save step `step`; called on every process. `state` is what the record keeps beside the step.

    `check` is called on the main process when everything is written, before the checkpoint gets its name.

    Afterwards the `keep_last` newest stay (0: all), and those of every `keep_every` steps (0: none more).

    Raises:
        ValueError: on every process when the main one could not write; what was there before is untouched.
    """
    final = run_dir / f"step-{step:08d}"
    aside = run_dir / f".{final.name}.{os.getpid()}.tmp"  # of this process alone
    weights, tensors = _whole_tensors(model, optimizer)

    def write() -> None:
        broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
        if broken:  # saved, it would become the newest, and a healthy checkpoint would be deleted for it
            raise ValueError(
                f"step {step} is not saved: {', '.join(broken[:3])}{', …' if len(broken) > 3 else ''} is not finite; "
                f"the checkpoints in {run_dir} are untouched: resume from one with a lower learning_rate"
            )
        aside.mkdir()  # without parents: if the run's folder was taken away, no new one is made in its place
        unsharded(model).save_pretrained(aside, state_dict=weights, max_shard_size="1TB")  # one file, however large
        tokenizer.save_pretrained(aside)
        average = {name: tensor for name, tensor in tensors.items() if name.endswith(".ema")}
        save_file({name: tensor for name, tensor in tensors.items() if name not in average}, aside / OPTIMIZER)
        if average:
            names = (name.removeprefix("state.").removesuffix(".ema") for name in average)
            save_file(dict(zip(names, average.values(), strict=True)), aside / AVERAGE, metadata={"format": "pt"})
        scale = {"loss_scale": accelerator.scaler.state_dict()} if accelerator.scaler else {}  # of fp16
        _complete(aside, {"format": FORMAT_VERSION, "step": step, **state, **scale})
        check()
        os.replace(aside, final)
        link_to(final, run_dir / "latest")
        whole = {int(path.name[5:]): path for path in _checkpoints(run_dir) if (path / RECORD).exists()}
        stay = kept(run_dir, [*whole], keep_last=keep_last, keep_every=keep_every)
        for old in (path for step, path in whole.items() if step not in stay):
            os.replace(old, run_dir / f".{old.name}.tmp")  # hidden first: half a checkpoint must not look whole
            shutil.rmtree(run_dir / f".{old.name}.tmp")

    def explained() -> None:
        try:
            write()
        except Exception as error:
            shutil.rmtree(aside, ignore_errors=True)
            if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:  # of tokenizers
                raise
            where = str(run_dir.resolve())
            raise ValueError(
                f"saving step {step} in {where} failed ({str(error).replace(str(run_dir), where)}); what was saved "
                "before is untouched: mend that (a full disk: make room) and run the same command again"
            ) from error

    on_main_process(accelerator, explained)
    return final


def kept(run_dir: Path, steps: Sequence[int], *, keep_last: int, keep_every: int) -> set[int]:
    """Those of `steps`, oldest first, that stay: the `keep_last` newest (0: all), every `keep_every`, and `best`."""
    always = {*steps[-keep_last:], best_step(run_dir)}
    return {step for step in steps if step in always or (keep_every and step % keep_every == 0)}


def best_step(run_dir: Path) -> int | None:
    """The step of the checkpoint that `best` means, where there is one."""
    best = linked(run_dir / "best")
    return int(best.resolve().name.removeprefix("step-")) if best.is_dir() else None


def resume_from(run_dir: Path, found: Path | None, *, step: int) -> None:
    """Make `found`, of step `step`, the newest checkpoint of the run; on the main process, before anything is saved.

    What a kill left of a save is deleted. Later checkpoints of a run that goes back are renamed to abandoned-…, so
    that a later `resume: auto` does not take them for the newest.

    Raises:
        ValueError: `latest` is no link.
    """
    if (run_dir / "latest").is_dir() and not (run_dir / "latest").is_symlink():
        raise ValueError(f"{run_dir / 'latest'} is a folder, where a link to the newest checkpoint belongs: remove it")
    for leftover in run_dir.glob(".step-*.tmp"):
        shutil.rmtree(leftover)
    for newer in (path for path in _checkpoints(run_dir) if path.name > f"step-{step:08d}"):
        shutil.rmtree(run_dir / f"abandoned-{newer.name}", ignore_errors=True)
        os.replace(newer, run_dir / f"abandoned-{newer.name}")
    if found and found.parent == run_dir.resolve():
        link_to(run_dir / found.name, run_dir / "latest")


def find_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` (auto, never, previous or a path) means, or None to start from the beginning.

    Raises:
        ValueError: a path that is no checkpoint; `previous` where there are fewer than two.
    """
    found = _checkpoints(run_dir.resolve())
    if resume == "auto":
        return found[-1] if found else None
    if resume == "never":
        return None
    if resume == "previous":
        if len(found) < 2:
            raise ValueError(f"resume is previous, but {run_dir} holds {len(found)} checkpoints: expected two")
        return found[-2]
    path = linked(Path(resume))
    if not (path / RECORD).is_file():
        raise ValueError(f"resume is {resume!r}, which is no complete checkpoint (no {RECORD}): give a step-… folder")
    return path.resolve()


def load_checkpoint(
    path: Path, *, model: PreTrainedModel, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> dict[str, Any]:
    """Put a checkpoint's weights and optimizer state into `model` and `optimizer`; returns its record.

    Called on every process, before there are gradients. The main one reads every file against the record's size and
    sha256 first.

    Raises:
        ValueError: a missing, truncated or changed file, or a state that does not fit the model; the file is named.
    """
    record = on_main_process(accelerator, lambda: verify_checkpoint(path))
    weights: dict[str, Any] = load_file(path / "model.safetensors")
    for name, source in model.all_tied_weights_keys.items():  # a tied tensor is in the file once
        if source in weights:
            weights[name] = weights[source]
    try:
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=isinstance(model, FSDPModule)))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not of this model: {' '.join(str(error).split())[:300]}") from None
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    current: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=flat)
    tensors = load_file(path / OPTIMIZER)
    if (path / AVERAGE).exists():
        tensors |= {f"state.{name}.ema": tensor for name, tensor in load_file(path / AVERAGE).items()}
    if tensors.keys() != {name for name in current if name.startswith("state.")}:
        raise ValueError(
            f"{path / OPTIMIZER} is not of this optimizer: it holds {len(tensors)} tensors of other names"
        )
    for name, tensor in tensors.items():
        now = current[name]
        if (tensor.shape, tensor.dtype) != (now.shape, now.dtype):  # a fused kernel would read past its end
            kinds = f"{list(tensor.shape)} {tensor.dtype}, not {list(now.shape)} {now.dtype}"
            raise ValueError(f"{path / OPTIMIZER} is not of this model: {name} has shape {kinds}")
    for name, now in current.items():
        if isinstance(now, DTensor):  # this process's shard of it; every process has read the whole
            whole = tensors[name].to(now.device)
            tensors[name] = distribute_tensor(whole, now.device_mesh, now.placements, src_data_rank=None)
    set_optimizer_state_dict(model, optimizer, current | tensors, options=flat)
    if accelerator.scaler and "loss_scale" in record:
        accelerator.scaler.load_state_dict(record["loss_scale"])
    return record


def verify_checkpoint(path: Path, *, to_resume: bool = True) -> dict[str, Any]:
    """Read every file of a checkpoint against its record, which is returned; the optimizer's state only to resume.

    Raises:
        ValueError: names the first file that is missing, of another size, or of another content.
    """
    advice = "resume from another checkpoint (--resume previous, or --resume PATH)"
    if not to_resume:
        advice = f"copy it again, or delete {RECORD} if you changed the checkpoint yourself"
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        intact = record.pop("sha256") == seal(record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path / RECORD} cannot be read ({type(error).__name__}: {error}): {advice}") from None
    if not intact:
        raise ValueError(f"{path / RECORD} is damaged (its sha256 is not the recorded one): {advice}")
    if record["format"] != FORMAT_VERSION:
        raise ValueError(f"{path} is of format {record['format']}, this code reads {FORMAT_VERSION}: {advice}")

    def verify(name: str) -> None:
        file, expected = path / name, record["files"][name]
        if Path(name).name != name:  # publish would upload it
            raise ValueError(f"{path / RECORD} names {name!r}, which is outside of the folder: {advice}")
        if not file.is_file():
            raise ValueError(f"{file} is missing: {advice}")
        if file.stat().st_size != expected["bytes"]:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, not {expected['bytes']}: {advice}")
        if file_sha256(file) != expected["sha256"]:
            raise ValueError(f"{file} is damaged (its sha256 is not the recorded one): {advice}")

    with ThreadPoolExecutor() as pool:
        list(pool.map(verify, [name for name in record["files"] if to_resume or name != OPTIMIZER]))
    return record


def _whole_tensors(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and optimizer state by parameter name, gathered where they are sharded (then empty on other ranks).

    Settings of the optimizer (lr, betas, decay) are the recipe's and not saved.
    """
    gather = isinstance(model, FSDPModule)
    options = StateDictOptions(full_state_dict=gather, cpu_offload=gather, flatten_optimizer_state_dict=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    flat: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=options)
    return (
        {name: value for name, value in weights.items() if name not in model.all_tied_weights_keys},
        {name: value.contiguous() for name, value in flat.items() if name.startswith("state.")},
    )


def _complete(folder: Path, record: dict[str, Any]) -> None:
    """Give every file its mode and its place in the record, write the record, and sync all of it to the disk."""
    umask = os.umask(0)
    os.umask(umask)

    def settle(file: Path) -> dict[str, Any]:
        file.chmod(0o666 & ~umask)  # safetensors writes 0600, which a group's other members cannot read
        sync(file)
        return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}

    files = sorted(folder.iterdir())
    with ThreadPoolExecutor() as pool:  # one file waits for the disk while another is hashed
        record["files"] = dict(zip([file.name for file in files], pool.map(settle, files), strict=True))
    record["sha256"] = seal(record)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    sync(folder / RECORD)
    sync(folder)


def _checkpoints(run_dir: Path) -> list[Path]:
    """The step-… folders, oldest first; whole ones and damaged ones."""
    return sorted(path for path in run_dir.glob(f"step-{'[0-9]' * 8}") if path.is_dir())
