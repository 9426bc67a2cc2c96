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
from gpt2repro.checks import check_dataset, check_recipe, initial_model, model_config, preparation_command
from gpt2repro.cli import UsageError, parse_recipe, write_recipe
from gpt2repro.data.loader import TrainLoader, validation_batches, validation_tokens
from gpt2repro.data.order import WindowOrder
from gpt2repro.data.prepare import prepare
from gpt2repro.data.shards import load_tokenizer, open_dataset, tokenizer_sha256
from gpt2repro.hub.publish import PUSH_WAIT_SECONDS, BackgroundPush
from gpt2repro.hub.upload import writable_repo
from gpt2repro.training.arguments import Recipe
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

DEFAULT_RECIPE = Path(__file__).with_name("recipes") / "demo.yaml"
SECONDS_BETWEEN_LINES = 10.0


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
        exit_code = Run(recipe).train()
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


class Run:
    """One run, from its recipe to its last checkpoint: `Run(recipe).train()` returns the exit code.

    Made in the order of reading: processes and device, data, model and optimizer, and where it goes on.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.folder = recipe, Path(recipe.output_dir)
        self.world_size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.accelerator = start_accelerator(recipe)
        transformers_logging.disable_progress_bar()  # a bar for every file of every checkpoint
        self.device, self.sharded = self.accelerator.device, self.accelerator.is_fsdp2
        self.compiled, self.loss_impl = compile_wanted(recipe, self.device), loss_form(recipe, self.device)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
        self.open_data()
        self.build_model()
        self.go_on()

    # ---- what a run is made of -----------------------------------------------------------------------------

    def open_data(self) -> None:
        """The dataset (made first, where the recipe says from what), the order of its windows, the benchmarks."""
        recipe = self.recipe
        if recipe.source and not (Path(recipe.dataset_dir[0]) / "dataset.json").exists():
            on_main_process(self.accelerator, lambda: prepare_dataset(recipe, world_size=self.world_size))
        dataset = open_dataset(list(recipe.dataset_dir), format=recipe.dataset_format, tokenizer=recipe.tokenizer)
        check_dataset(recipe, dataset)
        self.dataset, self.config = dataset, model_config(recipe, dataset)
        self.tokenizer = load_tokenizer(dataset.tokenizer)
        if tokenizer_sha256(self.tokenizer) != dataset.tokenizer_sha256:
            where = dataset.tokenizer
            raise ValueError(f"the tokenizer in {where} is not the one that made its tokens: copy it again")
        longest = self.config.n_positions
        self.tasks = [prepare_task(task, self.tokenizer, max_length=longest) for task in recipe.eval_tasks]
        if recipe.eval_every:  # too few tokens are an error now, not in an hour
            validation_tokens(dataset.split("val"), recipe.seq_len, recipe.eval_tokens)
        stream = dataset.split("train")
        self.loader = TrainLoader(
            stream,
            WindowOrder(stream.tokens, recipe.seq_len, seed=recipe.seed, shuffle=recipe.shuffle),
            sequences_per_step=recipe.global_batch_tokens // recipe.seq_len,
            micro_batch_size=recipe.micro_batch_size,
            rank=self.rank,
            world_size=self.world_size,
            vocab_size=self.config.vocab_size,
            device=self.device,
        )

    def build_model(self) -> None:
        """`raw`, the network; `model`, the same as Accelerate wraps it for several processes; the optimizer."""
        recipe = self.recipe
        raw = initial_model(recipe, self.config).train().to(self.device)
        self.n_parameters = raw.num_parameters()
        self.record = check_run_folder(recipe, **self.facts())
        if self.compiled:
            # In place and before prepare: one graph, clean state-dict keys, and no_sync keeps working. DDPOptimizer
            # would split the graph at every bucket. FSDP2 gathers between the blocks, so there each is a graph.
            torch._dynamo.config.optimize_ddp = False
            for part in raw.transformer.h if self.sharded else [raw]:
                part.compile(fullgraph=True, dynamic=False, mode=recipe.compile_mode)
        self.raw = raw
        self.model, self.optimizer = self.accelerator.prepare(raw, make_optimizer(raw, recipe))

    def go_on(self) -> None:
        """Resume where there is something to resume from; then, and not before, make the folder this run's."""
        recipe, self.first_step = self.recipe, 0
        # Found once for all: to each process of its own a shared disk may show another newest one.
        found = on_main_process(self.accelerator, lambda: find_checkpoint(self.folder, recipe.resume))
        if found:
            saved = load_checkpoint(found, model=self.raw, optimizer=self.optimizer.optimizer)
            self.first_step = saved["step"]
            check_resume(recipe, found, saved, self.dataset.fingerprint)
        metrics_file = self.folder / "metrics.jsonl"
        self.metrics = MetricsLog(None)
        self.pushes: BackgroundPush | None = None  # on the main process of a run with a hub_repo_id

        def open_folder() -> None:
            # A missing token or right is an error now, not in an hour.
            repo_id = writable_repo(recipe.hub_repo_id) if recipe.hub_repo_id else None
            # Held open, the record keeps other starts out of the folder while this one lives.
            self.held = write_run_record(self.folder, self.record, world_size=self.world_size)
            if repo_id:
                self.pushes = BackgroundPush(repo_id, run_dir=self.folder)
            go_on_from(self.folder, found, step=self.first_step)
            write_recipe(recipe, self.folder / "recipe.yaml")
            self.metrics = MetricsLog(metrics_file, step=self.first_step)

        on_main_process(self.accelerator, open_folder)
        rows = [r for r in read_metrics(metrics_file) if r["kind"] == "train" and r["step"] <= self.first_step]
        self.bad_steps = BadSteps(recipe, rows)
        self.accelerator.init_trackers(
            "gpt2repro",
            config={name: v if isinstance(v, (int, float, str)) else str(v) for name, v in asdict(recipe).items()},
            init_kwargs={tracker: {"name": self.folder.name} for tracker in ("wandb", "trackio")},
        )
        self.metrics.trackers = self.accelerator.trackers
        self.accelerator.print(self.description(found))

    # ---- the loop ------------------------------------------------------------------------------------------

    def train(self) -> int:
        """All steps with what happens between them; returns the exit code."""
        recipe, accelerator, metrics = self.recipe, self.accelerator, self.metrics
        self.stop = StopSignal()
        watchdog = Watchdog(recipe.watchdog_minutes, rank=self.rank, step=self.first_step)
        self.batches = self.loader.batches(self.first_step)
        shape = {name: getattr(self.config, name) for name in ("n_positions", "n_layer", "n_embd")}
        flops = flops_per_token(n_parameters=self.n_parameters, seq_len=recipe.seq_len, **shape)
        peak = peak_flops(self.device)
        profiler = None
        if recipe.profile_steps and accelerator.is_main_process:
            profiler = step_profiler(
                self.folder / "profile.json", steps=recipe.profile_steps, device=self.device, show=self.show
            )
        # A bar on a terminal alone; a log gets a line now and then.
        hidden = None if accelerator.is_main_process else True
        bar, shown = tqdm(total=recipe.max_steps, initial=self.first_step, unit="step", disable=hidden), -math.inf
        if self.first_step == 0:  # where it starts from; and what cannot work fails here, not in the middle of a run
            self.evaluate(0)
        step = saved = self.first_step
        for step in range(self.first_step + 1, recipe.max_steps + 1):
            began = time.perf_counter()
            loss, grad_norm, stopping = self.optimize(step)
            if profiler:
                profiler.step()
            tokens_per_second = recipe.global_batch_tokens / (time.perf_counter() - began)
            metrics.write(
                step, "train", loss=loss, lr=lr_at(step - 1, recipe), grad_norm=grad_norm,
                tokens=step * recipe.global_batch_tokens, tokens_per_second=tokens_per_second,
                mfu=tokens_per_second * flops / (peak * self.world_size) if peak else None,
                memory_bytes=peak_memory_bytes(self.device),
            )  # fmt: skip
            progress = f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s"
            bar.set_postfix_str(progress, refresh=False)
            bar.update()
            if bar.disable and began - shown >= SECONDS_BETWEEN_LINES:
                self.show(f"step {step:>6}  {progress}")
                shown = began

            self.evaluate(step)
            if step % recipe.save_every == 0 or step == recipe.max_steps or stopping:
                self.save(step)
                saved = step
            if self.pushes:
                self.report_pushes(step, self.pushes.finished())
            if stopping:
                break
            watchdog.step = step
        bar.close()
        self.batches.close()
        watchdog.stop()
        stopped = saved < recipe.max_steps
        if self.pushes:
            seconds = 0 if stopped else PUSH_WAIT_SECONDS
            self.report_pushes(step, self.pushes.wait(seconds, give_up=lambda: self.stop.received > 0))
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.print(summary(self.folder, step=step, stopped=stopped))
        return STOPPED_BY_SIGNAL if stopped else 0

    def optimize(self, step: int) -> tuple[float, float, bool]:
        """One update from the global batch; its loss, its gradient norm, and whether any process was told to stop."""
        accelerator, loader = self.accelerator, self.loader
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(step - 1, self.recipe) * group["lr_ratio"]
        torch.manual_seed(seed_of(self.recipe.seed, step, self.rank))  # dropout; a resumed run draws the same

        loss_sum = torch.zeros((), device=self.device)
        for micro_step in range(loader.accumulation):
            input_ids, targets = next(self.batches)
            is_last = micro_step == loader.accumulation - 1
            with contextlib.nullcontext() if is_last else accelerator.no_sync(self.model):
                loss = self.model(
                    input_ids, shift_labels=targets, use_cache=False, skip_logits=True, loss_impl=self.loss_impl
                ).loss
                accelerator.backward(loss / loader.accumulation)
            loss_sum += loss.detach() / loader.accumulation

        grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.grad_clip or math.inf)
        if self.sharded:
            grad_norm = grad_norm.full_tensor()
        # The one host sync of a step: the loss over all micro steps and processes, the norm, and whether to stop.
        stopping = torch.full((), float(bool(self.stop.received)), device=self.device)
        sums = accelerator.reduce(torch.stack([loss_sum / self.world_size, stopping]), "sum")
        train_loss, stopping_ranks, norm = torch.cat([sums, grad_norm.detach().reshape(1).to(sums)]).tolist()
        if bad := self.bad_steps.reason(step, train_loss, norm):
            self.show(f"step {step:>6}  not applied: {bad}")
            self.metrics.write(step, "bad_step", window_starts=loader.window_starts(step - 1).tolist())
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return train_loss, norm, stopping_ranks > 0

    # ---- what happens between steps ------------------------------------------------------------------------

    def evaluate(self, step: int) -> None:
        """Validation and samples, where it is their turn."""
        turns = ((self.recipe.eval_every, self.validate), (self.recipe.sample_every, self.draw_samples))
        for every, action in turns:
            if every and (step % every == 0 or step == self.recipe.max_steps):
                self.model.eval()
                action(step)
                self.model.train()

    def validate(self, step: int) -> None:
        """The loss on the validation windows, and the benchmarks of `eval_tasks`; every process does its share."""
        recipe, tokens = self.recipe, step * self.recipe.global_batch_tokens
        share = {"rank": self.rank, "world_size": self.world_size}
        batches = validation_batches(
            self.dataset.split("val"), seq_len=recipe.seq_len, max_tokens=recipe.eval_tokens,
            micro_batch_size=recipe.micro_batch_size, vocab_size=self.config.vocab_size, device=self.device, **share,
        )  # fmt: skip
        add = (lambda tensor: self.accelerator.reduce(tensor, "sum")) if self.world_size > 1 else None
        loss, counted = validation_loss(self.raw, batches, reduce=add, loss_impl=self.loss_impl)
        perplexity = math.exp(min(loss, 700.0))
        self.metrics.write(step, "val", loss=loss, perplexity=perplexity, eval_tokens=counted, tokens=tokens)
        self.show(f"step {step:>6}  validation loss {loss:.4f}, perplexity {perplexity:,.1f}")
        comparable = has_expected_loss(self.dataset.info, self.config, init_from=recipe.init_from)
        if comparable and (warning := loss_warning(tokens, loss)):
            self.metrics.write(step, "warning", text=warning, loss=loss, tokens=tokens)
            self.show(f"step {step:>6}  warning: {warning}")
        if self.tasks and step:
            # A sharded model runs on all processes at once or on none, so there each one scores every item.
            split = {} if self.sharded else {"gather_object": gather_object, **share}
            with self.accelerator.autocast():
                rows = evaluate_tasks(self.raw, self.tasks, **split)
            for row in rows:
                self.metrics.write(step, "eval", tokens=tokens, **row)
                self.show(f"step {step:>6}  " + ", ".join(f"{name} {value}" for name, value in row.items()))

    def draw_samples(self, step: int) -> None:
        """The same prompt every time; on every process, because a sharded model needs all of them to run."""
        texts = sample(
            self.raw, self.tokenizer, self.recipe.sample_prompt, num_samples=self.recipe.num_samples,
            max_new_tokens=self.recipe.sample_tokens, seed=self.recipe.seed,
        )  # fmt: skip
        self.metrics.write(step, "sample", prompt=self.recipe.sample_prompt, texts=texts)
        for text in texts:
            self.show(f"step {step:>6}  sample: {' '.join(text.split())}")

    def save(self, step: int) -> None:
        """A checkpoint, which is pushed to the Hub in the background where it is its turn."""
        recipe, began = self.recipe, time.perf_counter()
        checkpoint = save_checkpoint(
            self.folder, step, model=self.raw, optimizer=self.optimizer.optimizer, tokenizer=self.tokenizer,
            accelerator=self.accelerator, keep_last=recipe.keep_last, keep_every=recipe.keep_every,
            state={"tokens": step * recipe.global_batch_tokens, "dataset_fingerprint": self.dataset.fingerprint},
        )  # fmt: skip
        seconds = time.perf_counter() - began
        self.metrics.write(step, "checkpoint", seconds=seconds)
        self.show(f"step {step:>6}  saved in {seconds:.1f} s")
        if self.pushes and (step == recipe.max_steps or (recipe.hub_every and step % recipe.hub_every == 0)):
            self.pushes.submit(checkpoint)

    def report_pushes(self, step: int, rows: list[dict]) -> None:
        for row in rows:
            self.metrics.write(step, "push", **row)
            outcome = f"to {row['url']}" if "url" in row else f"failed: {row['error']}"
            self.show(f"step {step:>6}  push of step {row['checkpoint_step']} {outcome}")

    def show(self, line: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(line)

    # ---- what is said and recorded of it -------------------------------------------------------------------

    def facts(self) -> dict[str, dict]:
        """What run.json keeps of the dataset and the model."""
        sizes = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
        dataset = {
            "dir": self.recipe.dataset_dir, "fingerprint": self.dataset.fingerprint,
            "train_tokens": self.loader.stream.tokens, "source": self.dataset.info.get("source"),
        }  # fmt: skip
        model = {"parameters": self.n_parameters, **{name: getattr(self.config, name) for name in sizes}}
        return {"dataset": dataset, "model": model}

    def description(self, found: Path | None) -> str:
        """What is about to happen, before the first step."""
        recipe, precision = self.recipe, self.accelerator.mixed_precision
        return (
            f"{recipe.output_dir}: {self.n_parameters:,} parameters, {self.loader.stream.tokens:,} training tokens, "
            f"step {self.first_step} to {recipe.max_steps}" + (f", resumed from {found}" if found else "") + "\n"
            f"{self.world_size} x {self.device.type}, {precision} mixed precision, "
            f"{'compiled' if self.compiled else 'eager'}; {recipe.global_batch_tokens:,} tokens a step = "
            f"{self.world_size} processes x {self.loader.accumulation} micro steps x {recipe.micro_batch_size} "
            f"sequences x {recipe.seq_len} tokens\n"
            + memory_report(
                recipe, self.config, self.device, processes=self.world_size, n_parameters=self.n_parameters,
                bf16=precision == "bf16", chunked_loss=self.loss_impl == "chunked",
                shards=self.world_size if self.sharded else 1,
            )
        )  # fmt: skip


def check_resume(recipe: Recipe, found: Path, record: dict, fingerprint: str) -> None:
    """Refuse a checkpoint of another dataset, or one that lies at or past the end of another run."""
    if record["dataset_fingerprint"] != fingerprint:
        raise ValueError(f"{found} was trained on another dataset: start from its weights with --init_from")
    end = recipe.max_steps
    if record["step"] > end or (record["step"] == end and found.parent != Path(recipe.output_dir).resolve()):
        raise ValueError(f"{found} is at step {record['step']}, max_steps is {end}: give more steps")


def prepare_dataset(recipe: Recipe, *, world_size: int) -> None:
    """Make `dataset_dir` from the recipe's source; not from the Hub while other processes wait for it."""
    if world_size > 1 and recipe.source not in ("python-docs", "files"):
        raise ValueError(
            f"{recipe.dataset_dir[0]} does not exist, and making it takes longer than processes wait for each other: "
            f"{preparation_command(recipe)} --workers {os.cpu_count()}"
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
