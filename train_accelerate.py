"""Pre-train GPT-2: one run, readable from top to bottom.

    python train_accelerate.py                                             # recipes/demo.yaml
    accelerate launch --config_file accelerate_configs/ddp_8gpu.yaml train_accelerate.py \\
        --recipe recipes/gpt2-124m-10b.yaml --micro_batch_size 64          # the reproduction

Run the same command again to go on after any stop. `output_dir` then holds run.json, recipe.yaml, metrics.jsonl and
step-*/ with the link `latest`, which AutoModelForCausalLM loads. Exit codes: 0 done, 1 an error that was explained,
2 wrong usage, 75 stopped by a signal after saving.
"""

import contextlib
import gc
import hashlib
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from eval.multiple_choice import evaluate_tasks, prepare_task
from eval.sample import sample
from eval.validation import validation_loss
from gpt2repro.checks import check_dataset, check_init_from, check_recipe, model_config
from gpt2repro.cli import UsageError, parse_recipe, write_recipe
from gpt2repro.data.loader import TrainLoader, validation_batches, validation_tokens
from gpt2repro.data.order import WindowOrder
from gpt2repro.data.prepare import prepare
from gpt2repro.data.shards import load_tokenizer, open_dataset, tokenizer_sha256
from gpt2repro.hub.convert import load_as_gpt2repro
from gpt2repro.hub.publish import PUSH_WAIT_SECONDS, BackgroundPush
from gpt2repro.hub.upload import writable_repo
from gpt2repro.training.checkpoints import find_checkpoint, go_on_from, load_checkpoint, save_checkpoint
from gpt2repro.training.expected_loss import has_expected_loss, loss_warning
from gpt2repro.training.guards import STOPPED_BY_SIGNAL, BadSteps, StopSignal, Watchdog, on_main_process
from gpt2repro.training.launch import compile_wanted, loss_form, start_accelerator
from gpt2repro.training.memory import memory_report
from gpt2repro.training.metrics import MetricsLog, flops_per_token, peak_flops, peak_memory_bytes, read_metrics
from gpt2repro.training.optimizer import make_optimizer
from gpt2repro.training.profile import step_profiler
from gpt2repro.training.run_folder import check_run_folder, write_run_record
from gpt2repro.training.schedule import lr_at
from modeling_gpt2repro import GPT2ReproForCausalLM

DEFAULT_RECIPE = Path(__file__).with_name("recipes") / "demo.yaml"


def main(argv: list[str] | None = None) -> int:
    """Run the recipe that `argv` asks for; returns the exit code."""
    rank = int(os.environ.get("RANK", 0))
    try:
        recipe = parse_recipe(sys.argv[1:] if argv is None else argv, default=DEFAULT_RECIPE)
        check_recipe(recipe, world_size=int(os.environ.get("WORLD_SIZE", 1)))
    except ValueError as error:
        if rank == 0:  # every process finds the same
            explain(error, rank=0)
        return 2 if isinstance(error, UsageError) else 1
    try:
        exit_code = train(recipe)
    except (ValueError, OSError, ImportError) as error:
        explain(error, rank=rank)
        return 1
    except KeyboardInterrupt:  # the loop takes signals as its own
        explain(InterruptedError("interrupted before the first step; run the same command again"), rank=rank)
        return 130
    except RuntimeError as error:
        if is_lost_process(error):
            problem = "another process ended first, see its error; run the same command again"
        elif is_out_of_memory(error):
            problem = f"{str(error).splitlines()[0]} Lower micro_batch_size, or turn gradient_checkpointing on"
        else:
            raise
        explain(RuntimeError(problem), rank=rank)
        return 1
    # DDP must be gone before its process group is: freed after it, gloo's destructor can wait for ever.
    gc.collect()
    PartialState().destroy_process_group()
    return exit_code


def is_lost_process(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone: NCCL's and the store's type, or gloo's words."""
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the card's memory is used up, which has a type, or the host's, which has not."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def explain(error: Exception, *, rank: int) -> None:
    """One line on standard error for each thing that is wrong."""
    for line in str(error).splitlines():
        line = f"error on process {rank}: {line}" if rank else f"error: {line}"
        tqdm.write(line, file=sys.stderr)  # below the bar, not behind it


def train(recipe) -> int:
    """One run from its recipe to its last checkpoint; returns the exit code."""
    # ---- processes, device, precision ----------------------------------------------------------------------
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    accelerator = start_accelerator(recipe)
    transformers_logging.disable_progress_bar()  # a bar for every file of every checkpoint
    device, sharded = accelerator.device, accelerator.is_fsdp2
    compiled, loss_impl = compile_wanted(recipe, device), loss_form(recipe, device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32

    # ---- the data ------------------------------------------------------------------------------------------
    if recipe.source and not (Path(recipe.dataset_dir[0]) / "dataset.json").exists():
        on_main_process(accelerator, lambda: prepare_dataset(recipe, world_size=world_size))
    dataset = open_dataset(list(recipe.dataset_dir), format=recipe.dataset_format, tokenizer=recipe.tokenizer)
    check_dataset(recipe, dataset)
    config = model_config(recipe, dataset)
    tokenizer = load_tokenizer(dataset.tokenizer)
    if tokenizer_sha256(tokenizer) != dataset.tokenizer_sha256:
        raise ValueError(f"the tokenizer in {dataset.tokenizer} is not the one that made its tokens: copy it again")
    tasks = [prepare_task(task, tokenizer, max_length=config.n_positions) for task in recipe.eval_tasks]
    train_stream = dataset.split("train")
    if recipe.eval_every:
        val_stream = dataset.split("val")
        validation_tokens(val_stream, recipe.seq_len, recipe.eval_tokens)  # too few are an error now, not in an hour
    loader = TrainLoader(
        train_stream,
        WindowOrder(train_stream.tokens, recipe.seq_len, seed=recipe.seed, shuffle=recipe.shuffle),
        sequences_per_step=recipe.global_batch_tokens // recipe.seq_len,
        micro_batch_size=recipe.micro_batch_size,
        rank=rank,
        world_size=world_size,
        vocab_size=config.vocab_size,
        device=device,
    )

    # ---- the model and its optimizer -----------------------------------------------------------------------
    torch.manual_seed(recipe.seed)
    if recipe.init_from:
        raw = load_as_gpt2repro(recipe.init_from, vocab_size=config.vocab_size)
    else:
        raw = GPT2ReproForCausalLM(config)
    check_init_from(recipe, raw.config, config)
    raw.set_attn_implementation(recipe.attn_implementation)
    raw.train().to(device)
    if recipe.gradient_checkpointing:
        raw.gradient_checkpointing_enable()
    optimizer = make_optimizer(raw, recipe)
    n_parameters = raw.num_parameters()
    sizes = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    describe = {"parameters": n_parameters, **{name: getattr(config, name) for name in sizes}}
    facts = {"dir": recipe.dataset_dir, "fingerprint": dataset.fingerprint, "train_tokens": train_stream.tokens,
             "source": dataset.info.get("source")}  # fmt: skip
    run_record = check_run_folder(recipe, dataset=facts, model=describe)
    run_dir = Path(recipe.output_dir)
    profiler = None
    if recipe.profile_steps and accelerator.is_main_process:
        profiler = step_profiler(run_dir / "profile.json", steps=recipe.profile_steps, device=device, show=tqdm.write)
    if compiled:
        # In place and before prepare: one graph, clean state-dict keys, and no_sync keeps working. DDPOptimizer would
        # split the graph at every bucket. FSDP2 gathers between the blocks, which no graph can hold: a graph a block.
        torch._dynamo.config.optimize_ddp = False
        for part in raw.transformer.h if sharded else [raw]:
            part.compile(fullgraph=True, dynamic=False, mode=recipe.compile_mode)
    model, optimizer = accelerator.prepare(raw, optimizer)

    # ---- resume --------------------------------------------------------------------------------------------
    first_step, found = 0, find_checkpoint(run_dir, recipe.resume)
    if found:
        record = load_checkpoint(found, model=raw, optimizer=optimizer.optimizer)
        first_step = record["step"]
        check_resume(recipe, found, record, dataset.fingerprint)
    metrics, metrics_file = MetricsLog(None), run_dir / "metrics.jsonl"
    held: list = []  # what keeps other starts out of the folder while this one lives
    pushes: BackgroundPush | None = None  # on the main process of a run with a hub_repo_id

    def open_run_folder() -> None:
        nonlocal metrics, pushes
        if recipe.hub_repo_id:  # a missing token or right is an error now, not in an hour
            pushes = BackgroundPush(writable_repo(recipe.hub_repo_id), run_dir=run_dir)
        held.extend(write_run_record(run_dir, run_record, world_size=world_size))
        go_on_from(run_dir, found, step=first_step)
        write_recipe(recipe, run_dir / "recipe.yaml")
        metrics = MetricsLog(metrics_file, step=first_step)

    # Written last: a start that was refused leaves no run behind that the corrected command would not fit.
    on_main_process(accelerator, open_run_folder)
    rows = [row for row in read_metrics(metrics_file) if row["kind"] == "train" and row["step"] <= first_step]
    accelerator.init_trackers(
        "gpt2repro",
        config={name: v if isinstance(v, (int, float, str)) else str(v) for name, v in asdict(recipe).items()},
        init_kwargs={tracker: {"name": run_dir.name} for tracker in ("wandb", "trackio")},
    )
    metrics.trackers = accelerator.trackers
    accelerator.print(
        f"{recipe.output_dir}: {n_parameters:,} parameters, {train_stream.tokens:,} training tokens, "
        f"step {first_step} to {recipe.max_steps}" + (f", resumed from {found}" if found else "") + "\n"
        f"{world_size} x {device.type}, {accelerator.mixed_precision} mixed precision, "
        f"{'compiled' if compiled else 'eager'}; {recipe.global_batch_tokens:,} tokens a step = "
        f"{world_size} processes x {loader.accumulation} micro steps x {recipe.micro_batch_size} sequences "
        f"x {recipe.seq_len} tokens\n"
        + memory_report(
            recipe, config, n_parameters=n_parameters, bf16=accelerator.mixed_precision == "bf16",
            chunked_loss=loss_impl == "chunked", processes=world_size, sharded=sharded, device=device,
        )
    )  # fmt: skip

    # ---- what happens between steps ------------------------------------------------------------------------
    def show(line: str) -> None:
        if accelerator.is_main_process:
            tqdm.write(line)

    def validate(step: int) -> None:
        """The loss on the validation windows, and the benchmarks of `eval_tasks`; every process does its share."""
        model.eval()
        share = {"rank": rank, "world_size": world_size}
        batches = validation_batches(
            val_stream, seq_len=recipe.seq_len, max_tokens=recipe.eval_tokens,
            micro_batch_size=recipe.micro_batch_size, vocab_size=config.vocab_size, device=device, **share,
        )  # fmt: skip
        add = (lambda tensor: accelerator.reduce(tensor, "sum")) if world_size > 1 else None
        loss, counted = validation_loss(raw, batches, reduce=add)
        perplexity, tokens = math.exp(min(loss, 700.0)), step * recipe.global_batch_tokens
        metrics.write(step, "val", loss=loss, perplexity=perplexity, eval_tokens=counted, tokens=tokens)
        show(f"step {step:>6}  validation loss {loss:.4f}, perplexity {perplexity:,.1f}")
        comparable = has_expected_loss(dataset.info, config, init_from=recipe.init_from)
        if comparable and (warning := loss_warning(tokens, loss)):
            metrics.write(step, "warning", text=warning, loss=loss, tokens=tokens)
            show(f"step {step:>6}  warning: {warning}")
        if tasks and step:
            # A sharded model runs on all processes at once or on none, so there each one scores every item.
            split = {} if sharded else {"gather_object": gather_object, **share}
            with accelerator.autocast():
                rows = evaluate_tasks(raw, tasks, **split)
            for row in rows:
                metrics.write(step, "eval", tokens=tokens, **row)
                show(f"step {step:>6}  " + ", ".join(f"{name} {value}" for name, value in row.items()))
        model.train()

    def draw_samples(step: int) -> None:
        """The same prompt every time; on every process, because a sharded model needs all of them to run."""
        model.eval()
        texts = sample(
            raw, tokenizer, recipe.sample_prompt, num_samples=recipe.num_samples,
            max_new_tokens=recipe.sample_tokens, seed=recipe.seed,
        )  # fmt: skip
        model.train()
        metrics.write(step, "sample", prompt=recipe.sample_prompt, texts=texts)
        for text in texts:
            show(f"step {step:>6}  sample: {' '.join(text.split())}")

    def save(step: int) -> None:
        began = time.perf_counter()
        checkpoint = save_checkpoint(
            run_dir, step, model=raw, optimizer=optimizer.optimizer, tokenizer=tokenizer, accelerator=accelerator,
            state={"tokens": step * recipe.global_batch_tokens, "dataset_fingerprint": dataset.fingerprint},
            keep_last=recipe.keep_last, keep_every=recipe.keep_every,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        metrics.write(step, "checkpoint", seconds=seconds)
        show(f"step {step:>6}  saved in {seconds:.1f} s")
        if pushes and (step == recipe.max_steps or (recipe.hub_every and step % recipe.hub_every == 0)):
            pushes.submit(checkpoint)

    def report_pushes(step: int, rows: list[dict]) -> None:
        for row in rows:
            metrics.write(step, "push", **row)
            outcome = f"to {row['url']}" if "url" in row else f"failed: {row['error']}"
            show(f"step {step:>6}  push of step {row['checkpoint_step']} {outcome}")

    # ---- the loop ------------------------------------------------------------------------------------------
    stop, bad_steps, watchdog = StopSignal(), BadSteps(recipe, rows), Watchdog(recipe.watchdog_minutes, rank=rank)
    batches = loader.batches(first_step)
    flops = flops_per_token(
        n_parameters=n_parameters, n_positions=config.n_positions, n_layer=config.n_layer, n_embd=config.n_embd,
        seq_len=recipe.seq_len,
    )  # fmt: skip
    peak = peak_flops(device)
    bar = tqdm(total=recipe.max_steps, initial=first_step, unit="step", disable=not accelerator.is_main_process)
    if first_step == 0:  # where it starts from; and what cannot work fails here, not in the middle of a run
        if recipe.eval_every:
            validate(0)
        if recipe.sample_every:
            draw_samples(0)
    step = saved = first_step
    began = time.perf_counter()
    for step in range(first_step + 1, recipe.max_steps + 1):
        lr = lr_at(step - 1, recipe)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        torch.manual_seed(seed_of(recipe.seed, step, rank))  # dropout; so that a resumed run draws the same

        loss_sum = torch.zeros((), device=device)
        for micro_step in range(loader.accumulation):
            input_ids, targets = next(batches)
            is_last = micro_step == loader.accumulation - 1
            with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                loss = model(
                    input_ids, shift_labels=targets, use_cache=False, skip_logits=True, loss_impl=loss_impl
                ).loss
                accelerator.backward(loss / loader.accumulation)
            loss_sum += loss.detach() / loader.accumulation

        grad_norm = accelerator.clip_grad_norm_(model.parameters(), recipe.grad_clip or math.inf)
        if sharded:
            grad_norm = grad_norm.full_tensor()
        # The one host sync of a step: the loss over all micro steps and processes, the norm, and whether to stop.
        stopping = torch.full((), float(bool(stop.received)), device=device)
        sums = accelerator.reduce(torch.stack([loss_sum / world_size, stopping]), "sum")
        train_loss, stopping_ranks, norm = torch.cat([sums, grad_norm.detach().reshape(1).to(sums)]).tolist()
        if bad := bad_steps.reason(step, train_loss, norm):
            show(f"step {step:>6}  not applied: {bad}")
            metrics.write(step, "bad_step", window_starts=loader.window_starts(step - 1).tolist())
        else:
            optimizer.step()
        optimizer.zero_grad()
        if profiler:
            profiler.step()

        seconds = time.perf_counter() - began
        tokens_per_second = recipe.global_batch_tokens / seconds
        metrics.write(
            step, "train", loss=train_loss, lr=lr, grad_norm=norm, tokens=step * recipe.global_batch_tokens,
            tokens_per_second=tokens_per_second,
            mfu=tokens_per_second * flops / (peak * world_size) if peak else None,
            memory_bytes=peak_memory_bytes(device),
        )  # fmt: skip
        bar.set_postfix_str(f"loss {train_loss:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
        bar.update()

        last_step = step == recipe.max_steps
        if recipe.eval_every and (step % recipe.eval_every == 0 or last_step):
            validate(step)
        if recipe.sample_every and (step % recipe.sample_every == 0 or last_step):
            draw_samples(step)
        if step % recipe.save_every == 0 or last_step or stopping_ranks:
            save(step)
            saved = step
        if pushes:
            report_pushes(step, pushes.finished())
        if stopping_ranks:
            break
        watchdog.step = step
        began = time.perf_counter()
    bar.close()
    batches.close()
    watchdog.stop()
    stopped = saved < recipe.max_steps
    if pushes:
        report_pushes(step, pushes.wait(0 if stopped else PUSH_WAIT_SECONDS))
    for tracker in accelerator.trackers:
        tracker.finish()

    # ---- the end -------------------------------------------------------------------------------------------
    if accelerator.is_main_process:
        print(summary(run_dir, step=step, stopped=stopped))
    return STOPPED_BY_SIGNAL if stopped else 0


def check_resume(recipe, found: Path, record: dict, fingerprint: str) -> None:
    """Refuse a checkpoint of another dataset, or one that lies at or past the end of another run."""
    if record["dataset_fingerprint"] != fingerprint:
        raise ValueError(f"{found} was trained on another dataset: start from its weights with --init_from")
    end = recipe.max_steps
    if record["step"] > end or (record["step"] == end and found.parent != Path(recipe.output_dir).resolve()):
        raise ValueError(f"{found} is at step {record['step']}, max_steps is {end}: give more steps")


def prepare_dataset(recipe, *, world_size: int) -> None:
    """Make `dataset_dir` from the recipe's source; not from the Hub while other processes wait for it."""
    if world_size > 1 and recipe.source not in ("python-docs", "files"):
        raise ValueError(
            f"{recipe.dataset_dir[0]} does not exist, and making it takes longer than processes wait for each other: "
            f"python -m gpt2repro.data.prepare --source {recipe.source} --tokenizer {recipe.tokenizer} "
            f"--out {recipe.dataset_dir[0]} --workers {os.cpu_count()}"
        )
    print(f"preparing {recipe.dataset_dir[0]} from {recipe.source}")
    prepare(
        source=recipe.source, files=list(recipe.files) or None, tokenizer=recipe.tokenizer, out=recipe.dataset_dir[0],
        val_tokens=recipe.val_tokens,
    )  # fmt: skip


def seed_of(seed: int, step: int, rank: int) -> int:
    """A seed for one process and step that resumes without a saved random state."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8], "little")


def summary(run_dir: Path, *, step: int, stopped: bool) -> str:
    """The last words of a run: where it ended and how to load it."""
    path = run_dir / "latest"
    if stopped:
        return f"stopped by a signal after saving step {step} in {path}; run the same command again to go on"
    return (
        f"done: step {step}, {path}\n\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'model = AutoModelForCausalLM.from_pretrained("{path}", trust_remote_code=True)\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{path}", trust_remote_code=True)'
    )


if __name__ == "__main__":
    sys.exit(main())
