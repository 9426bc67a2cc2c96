"""Pre-train GPT-2: one run, readable from top to bottom.

    python train_accelerate.py                                             # recipes/demo.yaml
    python train_accelerate.py --text my.txt                               # your own text: gpt2repro/own_text.py
    accelerate launch --config_file accelerate_configs/ddp_8gpu.yaml train_accelerate.py \\
        --recipe recipes/gpt2-124m-10b.yaml --micro_batch_size 64          # the reproduction

The same command again resumes after any stop. `output_dir` holds run.json, recipe.yaml, metrics.jsonl and step-*/ with
the link `latest`, which AutoModelForCausalLM loads. Exit codes: gpt2repro/command.py.
"""

from gpt2repro import command
from gpt2repro.recipe import Recipe
from gpt2repro.recipe_parser import read_recipe

if command.starting(__name__):
    command.parse_early(read_recipe)

import contextlib
import gc
import hashlib
import itertools
import math
import os
import sys
import time
from collections.abc import Iterable
from functools import partial

import torch
from accelerate import Accelerator, PartialState
from transformers import PreTrainedModel

from gpt2repro import processes
from gpt2repro.data.training_data import open_data
from gpt2repro.eval.in_training import Evaluation
from gpt2repro.hub import initial, mirror, push
from gpt2repro.run.folder import RunFolder
from gpt2repro.run.metrics import MetricsLog
from gpt2repro.train import estimates
from gpt2repro.train.first_step import check_first_step
from gpt2repro.train.launch import compile_in_place, loss_form, start_accelerator
from gpt2repro.train.optimizer import averaged_weights, make_optimizer
from gpt2repro.train.profile import step_profiler
from gpt2repro.train.safety import BadSteps, EarlyStop, StopSignal, Watchdog, explanation
from gpt2repro.train.schedule import lr_at


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says; returns the exit code."""

    def work() -> int:
        recipe = initial.take_shape(read_recipe(argv, announce=True), world_size=int(os.environ.get("WORLD_SIZE", 1)))
        # Started before the processes wait for each other for the first time.
        watchdog = Watchdog(recipe.watchdog_minutes, rank=int(os.environ.get("RANK", 0)))
        try:
            return train(recipe, watchdog)
        except RuntimeError as error:
            if advice := explanation(error):
                raise ValueError(advice) from None
            raise
        finally:
            watchdog.stop()

    code = command.run(work)
    if code in (command.DONE, command.STOPPED_BY_SIGNAL):
        # Free DDP before the process group. In the other order gloo's destructor can hang.
        gc.collect()
        PartialState().destroy_process_group()
    return code


def train(recipe: Recipe, watchdog: Watchdog) -> int:
    """One run: its parts in the order in which they are made, then the loop; returns the exit code."""
    # ---- processes, data, model, optimizer -----------------------------------------------------------------
    accelerator = start_accelerator(recipe)
    processes.check_same(accelerator, "a recipe", recipe)
    device, world_size, rank = accelerator.device, accelerator.num_processes, accelerator.process_index
    loss_impl = loss_form(recipe, device)
    data = open_data(recipe, accelerator)
    settings = {"vocab_size": data.vocab_size, "eot_id": data.eot_id, "verify": accelerator.is_main_process}
    # `raw` is the network itself; `model` below is what Accelerate makes of it: with autocast, in DDP or FSDP2.
    raw = processes.on_every_process(lambda: initial.initial_model(recipe, **settings))
    raw.train().to(device)
    facts = {"dataset": data.facts(), "model": model_facts(raw)}
    folder = RunFolder(recipe.output_dir)
    recipe = processes.on_main_process(accelerator, lambda: folder.with_its_steps(recipe))
    processes.on_main_process(accelerator, lambda: folder.check(recipe, **facts))
    if recipe.mirror_url():
        restore = partial(mirror.restore, folder, recipe, dataset=facts["dataset"])
        recipe = processes.on_main_process(accelerator, restore)
    compiled = compile_in_place(raw, recipe, accelerator)
    model, optimizer = accelerator.prepare(raw, make_optimizer(raw, recipe))

    # ---- resume, check, take the folder --------------------------------------------------------------------
    checkpoint = processes.on_main_process(accelerator, lambda: folder.find_checkpoint(recipe.resume))
    start_step = 0
    if checkpoint:
        start_step = folder.load(
            checkpoint, recipe, model=raw, optimizer=optimizer.optimizer, accelerator=accelerator,
            fingerprint=data.fingerprint,
        )  # fmt: skip
    first_batch = data.loader.first_batch(start_step)

    def backward(micro_batches: list, loss_impl: str = loss_impl) -> torch.Tensor:
        return micro_steps(accelerator, model, micro_batches, len(micro_batches), loss_impl)

    checked = check_first_step(accelerator, raw, backward, first_batch, loss_impl=loss_impl, compiled=compiled)
    if recipe.max_minutes:
        speed = world_size * estimates.tokens_per_second(backward, first_batch)
        raw.zero_grad()
        fitting = partial(estimates.within_minutes, recipe, speed, start_step=start_step)
        recipe, chosen = processes.on_main_process(accelerator, fitting)
        checked += f"\n{chosen}"
    evaluation = processes.on_every_process(lambda: Evaluation(recipe, data, accelerator, loss_impl=loss_impl))
    log, pushes = MetricsLog(None), list[push.BackgroundPush]()

    def take_folder() -> None:
        """On the main process; on the others the log shows nothing and nothing is pushed."""
        nonlocal log
        if recipe.hub_repo_id:
            pushes.append(push.HubPush(recipe, run_dir=folder.path))
        folder.claim(recipe, **facts, world_size=world_size)
        if recipe.mirror_url():
            pushes.insert(0, mirror.MirrorPush(recipe, folder))
        folder.resume_from(checkpoint, step=start_step)
        log = folder.open_metrics(recipe, step=start_step)

    processes.on_main_process(accelerator, take_folder)
    rows = processes.on_main_process(accelerator, lambda: folder.rows(up_to=start_step))
    resumed = f", resumed from {checkpoint}" if checkpoint else ""
    log.show(f"{recipe.output_dir}: step {start_step} to {recipe.max_steps}{resumed}")
    log.show(description(recipe, accelerator, raw, data, compiled=compiled, loss_impl=loss_impl))
    log.show(checked)
    early_stop = EarlyStop(recipe, rows)
    ended_early = early_stop.reason()  # a run that ended early does not train on when it is started again

    def mark_best() -> None:
        if early_stop.best is not None:
            processes.on_main_process(accelerator, partial(folder.mark_best, early_stop.best))

    mark_best()  # a kill may have come between a validation and this
    for each in pushes:
        each.catch_up(checkpoint, step=start_step, rows=rows, ended=bool(ended_early))

    # ---- the loop ------------------------------------------------------------------------------------------
    stop, bad_steps = StopSignal(), BadSteps(recipe, rows)
    watchdog.step = start_step
    flops_per_token, peak_flops = estimates.speed_limits(raw, recipe.seq_len, world_size=world_size)
    batches, accumulation = data.loader.batches(start_step), data.loader.accumulation
    profiler = None
    if recipe.profile_steps and accelerator.is_main_process:
        left = recipe.max_steps - start_step
        profiler = step_profiler(folder.profile, steps=recipe.profile_steps, left=left, device=device, show=log.show)

    def evaluate(step: int) -> None:
        """Write the rows of what is due at this step: validation, benchmarks, samples."""
        for kind, values in evaluation(step, raw, averaged_weights(raw, optimizer.optimizer)):
            log.write(step, kind, **values)
            if kind == "val":
                early_stop.add(step, values["loss"])
                mark_best()

    # Evaluate before the first step, so that what cannot work fails now. After a resume this is done already, unless
    # the run was stopped between its save and its evaluation.
    if not any(row["step"] == start_step and row["kind"] in ("val", "sample") for row in rows):
        evaluate(start_step)
    step = saved = start_step
    for step in () if ended_early else range(start_step + 1, recipe.max_steps + 1):
        began = time.perf_counter()
        lr = lr_at(step - 1, recipe)  # the loop counts its steps from 1, the schedule and the data count from 0
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        torch.manual_seed(seed_of(recipe.seed, step, rank))  # dropout: a resumed run draws the same

        loss_sum = micro_steps(accelerator, model, itertools.islice(batches, accumulation), accumulation, loss_impl)
        norm = processes.whole(accelerator.clip_grad_norm_(model.parameters(), recipe.grad_clip or math.inf))
        # The one host sync of a step: the loss over all micro-steps and processes, the norm, and whether to stop.
        stopping = torch.full((), float(stop.wanted()), device=device)
        sums = accelerator.reduce(torch.stack([loss_sum / world_size, stopping]), "sum")
        loss, stopping_ranks, grad_norm = torch.cat([sums, norm.detach().reshape(1).to(sums)]).tolist()
        if accelerator.scaler and bad_steps.overflowed(step, loss, grad_norm):  # fp16
            accelerator.scaler.update()  # lowers the loss scale
            log.write(step, "overflow", loss_scale=accelerator.scaler.get_scale())
        elif bad := bad_steps.reason(step, loss, grad_norm):
            if accelerator.scaler:
                accelerator.scaler.update()  # ends the step for the scaler too, without optimizer.step
            log.write(step, "bad_step", reason=bad, window_starts=data.loader.window_starts(step - 1).tolist())
        else:
            optimizer.step()
        optimizer.zero_grad()

        if profiler:
            profiler.step()
        tokens_per_second = recipe.global_batch_tokens / (time.perf_counter() - began)
        mfu = tokens_per_second * flops_per_token / peak_flops if peak_flops else None
        log.write(
            step, "train", loss=loss, lr=lr, grad_norm=grad_norm, tokens=step * recipe.global_batch_tokens,
            tokens_per_second=tokens_per_second, mfu=mfu, memory_bytes=estimates.peak_memory_bytes(device),
        )  # fmt: skip
        newest = None
        if step % recipe.save_every == 0 or step == recipe.max_steps or stopping_ranks:
            began = time.perf_counter()
            newest = folder.save(
                step, recipe, model=raw, optimizer=optimizer.optimizer, tokenizer=data.tokenizer,
                accelerator=accelerator, fingerprint=data.fingerprint,
            )  # fmt: skip
            saved = step
            log.write(step, "checkpoint", seconds=time.perf_counter() - began)
        evaluate(step)  # after the save: an evaluation that fails loses no step
        ended_early = early_stop.reason()
        for each in pushes:
            if newest and (ended_early or each.is_due(step)):
                each.submit(newest)
            for row in each.finished():
                log.write(step, each.kind, **row)
        if ended_early or stopping_ranks:
            break
        watchdog.step = step

    # ---- the end -------------------------------------------------------------------------------------------
    batches.close()
    watchdog.stop()
    stopped = saved < recipe.max_steps and not ended_early
    for each in pushes:
        for row in each.wait(stopped=stopped, give_up=stop.wanted):
            log.write(step, each.kind, **row)
    log.close()
    if ended_early:
        log.show(f"ended early: {ended_early}")
    log.show(summary(folder, step=step, stopped=stopped))
    folder.release()
    return command.STOPPED_BY_SIGNAL if stopped else command.DONE


def micro_steps(
    accelerator: Accelerator, model: torch.nn.Module, micro_batches: Iterable, count: int, loss_impl: str
) -> torch.Tensor:
    """Leave the mean gradient of `count` micro-batches in the model; returns their mean loss, on the device."""
    loss_sum = torch.zeros((), device=accelerator.device)
    for micro_step, batch in enumerate(micro_batches, start=1):
        with contextlib.nullcontext() if micro_step == count else accelerator.no_sync(model):
            loss = model(**batch, use_cache=False, skip_logits=True, loss_impl=loss_impl).loss
            accelerator.backward(loss / count)
        loss_sum += loss.detach() / count
    return loss_sum


def seed_of(seed: int, step: int, rank: int) -> int:
    """A seed for one process and step: a resumed run needs no saved random state."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8], "little")


def model_facts(model: PreTrainedModel) -> dict[str, int]:
    """What run.json keeps of the network."""
    sizes = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    return {"parameters": model.num_parameters(), **{name: getattr(model.config, name) for name in sizes}}


def description(recipe: Recipe, accelerator: Accelerator, raw, data, *, compiled: bool, loss_impl: str) -> str:
    """What is about to be trained, on what, and what it needs."""
    world_size, precision, loader = accelerator.num_processes, accelerator.mixed_precision, data.loader
    return (
        f"{raw.num_parameters():,} parameters, {loader.stream.tokens:,} training tokens; {world_size} x "
        f"{accelerator.device.type}, {precision} mixed precision, {'compiled' if compiled else 'eager'}\n"
        f"{recipe.global_batch_tokens:,} tokens a step = {world_size} processes x {loader.accumulation} micro-steps x "
        f"{recipe.micro_batch_size} sequences x {recipe.seq_len} tokens\n"
        + estimates.memory_report(
            recipe, raw.config, accelerator.device, processes=world_size, n_parameters=raw.num_parameters(),
            bf16=precision != "no", chunked_loss=loss_impl == "chunked",
            shards=world_size if accelerator.is_fsdp2 else 1,
        )
    )  # fmt: skip


def summary(folder: RunFolder, *, step: int, stopped: bool) -> str:
    """The last lines of a run: where it ended and how to load it."""
    if stopped:
        return f"stopped by a signal after saving step {step} in {folder.latest}; run the same command again to resume"
    checkpoint = folder.best
    return (
        f"done: step {step}, {checkpoint}\n\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'model = AutoModelForCausalLM.from_pretrained("{checkpoint}", trust_remote_code=True)\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{checkpoint}", trust_remote_code=True)'
    )


if __name__ == "__main__":
    sys.exit(main())
