"""The recipe of a run: every field with its default, its unit and its help line, and the batch arithmetic.

A recipe is YAML plus command line (gpt2repro/cli.py); it says all that defines a run. `Recipe.problems` names
everything that is wrong with one, a line each, before anything is loaded or written.
"""

from dataclasses import dataclass, field, fields
from typing import Any

SCHEDULES = ("cosine", "constant", "wsd_linear", "wsd_sqrt")
OPTIMIZERS = ("adamw", "muon")
DATASET_FORMATS = ("auto", "gpt2repro", "build-nanogpt", "llm.c", "nanogpt")
TRACKERS = ("tensorboard", "wandb", "trackio")
LOSSES = ("auto", "plain", "chunked")
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flex_attention")

# A run is the same run as long as these hold; anything else (micro batch, precision, cadence) may change on resume.
DEFINING_FIELDS = (
    "model", "n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "dropout", "init_from", "seq_len",
    "global_batch_tokens", "max_steps", "optimizer", "learning_rate", "muon_learning_rate", "min_lr_ratio",
    "warmup_steps", "schedule", "decay_ratio", "weight_decay", "beta1", "beta2", "grad_clip", "seed", "shuffle",
)  # fmt: skip


def _option(default: Any, help_line: str, *, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help_line, "choices": choices})


@dataclass(frozen=True)
class Recipe:
    """All that defines a run. The defaults are the reproduction: 10B tokens in 19,073 steps of 524,288."""

    # where
    output_dir: str = _option("runs/gpt2-124m", "folder of the run: checkpoints, metrics.jsonl, run.json")
    dataset_dir: tuple[str, ...] = _option(
        ("data/fineweb-edu-10b",), "prepared datasets, several are one stream; made from source when there is none"
    )
    dataset_format: str = _option("auto", "of dataset_dir; nanogpt's .bin must be named", choices=DATASET_FORMATS)
    source: str | None = _option(
        None, "where documents come from when dataset_dir must be made (python-docs, files, …)"
    )
    files: tuple[str, ...] = _option((), "paths or globs for source: files")
    tokenizer: str | None = _option(None, "folder, Hub id, or train:N for a byte-level BPE of N entries")
    val_tokens: int | None = _option(
        None, "validation tokens cut off when the dataset is made (default: by document hash)"
    )
    # the model
    model: str = _option("gpt2", "named shape: gpt2, gpt2-medium, gpt2-large, gpt2-xl, demo")
    n_layer: int | None = _option(None, "blocks, instead of the named shape's")
    n_head: int | None = _option(None, "attention heads, instead of the named shape's")
    n_embd: int | None = _option(None, "channels, instead of the named shape's")
    n_positions: int | None = _option(None, "longest sequence in tokens, instead of the named shape's")
    vocab_size: int | None = _option(None, "token ids, instead of the tokenizer's number of entries")
    dropout: float = _option(0.0, "probability on embeddings, attention and residuals")
    init_from: str | None = _option(None, "checkpoint (ours, stock GPT-2, nanoGPT's .pt) whose weights start the run")
    # the batch
    seq_len: int = _option(1024, "tokens a sequence (T)")
    global_batch_tokens: int = _option(524_288, "tokens an optimizer step, over all processes")
    micro_batch_size: int = _option(16, "sequences a process and micro step (B): what fits the memory")
    max_steps: int = _option(19_073, "optimizer steps")
    # the optimizer
    optimizer: str = _option(
        "adamw", "muon is Muon for the matrices of the blocks and AdamW for the rest", choices=OPTIMIZERS
    )
    learning_rate: float = _option(6e-4, "peak learning rate")
    muon_learning_rate: float | None = _option(None, "peak of Muon's matrices, instead of learning_rate")
    min_lr_ratio: float = _option(0.1, "floor of the schedule, as a share of the peak")
    warmup_steps: int = _option(715, "steps of linear warm-up")
    schedule: str = _option("cosine", "what follows the warm-up", choices=SCHEDULES)
    decay_ratio: float = _option(0.2, "share of max_steps that the decay of wsd_linear and wsd_sqrt takes, at the end")
    weight_decay: float = _option(0.1, "decay of tensors of two dimensions and more")
    beta1: float = _option(0.9, "AdamW beta1")
    beta2: float = _option(0.95, "AdamW beta2")
    grad_clip: float = _option(1.0, "largest gradient norm; 0 turns clipping off")
    on_bad_step: str = _option("skip", "what a non-finite loss or gradient does", choices=("skip", "stop"))
    outlier_z: float = _option(
        0.0, "standard deviations above the last 128 steps' mean from which a loss or gradient is bad too; 0 is none"
    )
    max_bad_steps: int = _option(10, "bad steps in a row after which the run stops all the same")
    # randomness
    seed: int = _option(1337, "seed of the initialisation, the data order and dropout")
    shuffle: bool = _option(True, "a fresh permutation of all windows every epoch; false reads them in order")
    # speed and memory
    mixed_precision: str = _option(
        "auto", "auto takes the launcher's, else the device's best", choices=("auto", "no", "bf16")
    )
    compile: str = _option(
        "auto", "torch.compile; auto takes the launcher's, else true on CUDA", choices=("auto", "true", "false")
    )
    compile_mode: str = _option("default", "of torch.compile; the other tries more kernels", choices=COMPILE_MODES)
    attn_implementation: str = _option("sdpa", "attention kernels", choices=ATTENTION)
    loss_impl: str = _option(
        "auto", "chunked holds the logits of an eighth of the tokens; auto: chunked on CUDA", choices=LOSSES
    )
    gradient_checkpointing: bool = _option(False, "recompute activations: less memory, about a third more time")
    profile_steps: int = _option(0, "steps to profile, from the fifth on, into output_dir/profile.json; 0 is none")
    # cadence
    eval_every: int = _option(250, "steps between validations; 0 is never")
    eval_tokens: int = _option(10_485_760, "validation tokens a time (build-nanogpt: 20 batches of 524,288)")
    eval_tasks: tuple[str, ...] = _option((), "benchmarks at every validation: TASK[:STYLE][:LIMIT][=FILE] …")
    sample_every: int = _option(250, "steps between samples; 0 is never")
    sample_prompt: str = _option("Hello, I'm a language model,", "what samples begin with")
    sample_tokens: int = _option(32, "new tokens a sample")
    num_samples: int = _option(4, "samples a time")
    save_every: int = _option(1000, "steps between checkpoints; the last step is always saved")
    keep_last: int = _option(2, "newest checkpoints kept; 0 keeps all")
    keep_every: int = _option(0, "steps between checkpoints that are kept for good; 0 is none")
    watchdog_minutes: float = _option(30.0, "minutes without progress after which a process says where; 0 is never")
    log_with: tuple[str, ...] = _option((), "trackers beside metrics.jsonl: tensorboard, wandb, trackio")
    hub_repo_id: str | None = _option(None, "OWNER/NAME on the Hub, which gets checkpoints while the run goes on")
    hub_every: int = _option(0, "steps between pushes, a multiple of save_every; 0 pushes the last checkpoint alone")
    resume: str = _option("auto", "auto, never, previous (the checkpoint before the newest), or a checkpoint's path")

    def problems(self, shape: dict[str, int] | None, *, world_size: int = 1) -> list[str]:
        """Everything wrong with this recipe, a line each; empty when it can run.

        `shape` is the named model's sizes with the overrides applied, or None when `model` is no known name.
        """
        found = []
        if shape is None:
            found.append(f"model is {self.model!r}: give one of gpt2, gpt2-medium, gpt2-large, gpt2-xl, demo")
        for item in fields(self):
            value, choices = getattr(self, item.name), item.metadata["choices"]
            if choices and value not in choices:
                found.append(f"{item.name} is {value!r}: give one of {', '.join(choices)}")
        at_least = {
            "seq_len": 1, "global_batch_tokens": 1, "micro_batch_size": 1, "max_steps": 1, "warmup_steps": 0,
            "eval_every": 0, "eval_tokens": 1, "sample_every": 0, "sample_tokens": 1, "num_samples": 1,
            "save_every": 1, "keep_last": 0, "keep_every": 0, "hub_every": 0, "max_bad_steps": 1, "seed": 0,
            "profile_steps": 0, "learning_rate": 0, "weight_decay": 0, "grad_clip": 0, "outlier_z": 0,
            "watchdog_minutes": 0,
        }  # fmt: skip
        found += [f"{name} is {getattr(self, name)}: give at least {low}" for name, low in at_least.items()
                  if not getattr(self, name) >= low]  # fmt: skip
        found += [f"log_with is {name!r}: give one of {', '.join(TRACKERS)}"
                  for name in self.log_with if name not in TRACKERS]  # fmt: skip
        for name in ("beta1", "beta2", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"{name} is {getattr(self, name)}: give a number from 0 to below 1")
        if not 0 <= self.min_lr_ratio <= 1:
            found.append(f"min_lr_ratio is {self.min_lr_ratio}: give a number from 0 to 1")
        if not 0 < self.decay_ratio <= 1:
            found.append(f"decay_ratio is {self.decay_ratio}: give a number above 0, up to 1")
        elif self.schedule.startswith("wsd") and self.warmup_steps > (1 - self.decay_ratio) * self.max_steps:
            found.append(
                f"warmup_steps={self.warmup_steps} and a decay over decay_ratio={self.decay_ratio} of "
                f"max_steps={self.max_steps} overlap: lower one of them"
            )
        if self.muon_learning_rate is not None and (self.optimizer != "muon" or not self.muon_learning_rate > 0):
            found.append(
                f"muon_learning_rate is {self.muon_learning_rate} with optimizer {self.optimizer}: "
                "give a number above 0 with optimizer: muon, or leave it out"
            )
        if self.optimizer == "muon" and not self.learning_rate > 0:
            found.append(f"learning_rate is {self.learning_rate}: muon's is a multiple of it, give a number above 0")
        if self.warmup_steps >= self.max_steps > 0:
            found.append(f"warmup_steps={self.warmup_steps} leaves nothing of max_steps={self.max_steps}: lower it")
        if len(self.dataset_dir) != 1 and (self.source or not self.dataset_dir):
            found.append(
                f"dataset_dir names {len(self.dataset_dir)} folders: give one to make from source, or no source"
            )
        if self.source and not self.tokenizer:
            found.append("a source without a tokenizer: give a folder, a Hub id, or train:N")
        if (self.source == "files") != bool(self.files):
            found.append(
                f"source is {self.source} and files names {len(self.files)}: they go together, --source files"
            )
        if self.profile_steps > 0 and self.profile_steps + 4 > self.max_steps:
            found.append(
                f"profile_steps={self.profile_steps} are taken after 4 others, max_steps={self.max_steps} is less: "
                "lower profile_steps or raise max_steps"
            )
        if self.eval_tasks and not self.eval_every:
            found.append("eval_tasks are scored at every validation, but eval_every is 0: give a number of steps")
        if self.hub_every and not self.hub_repo_id:
            found.append(f"hub_every is {self.hub_every} without a hub_repo_id: give OWNER/NAME, or leave it out")
        if self.hub_every % max(1, self.save_every):
            found.append(f"hub_every={self.hub_every} is not a multiple of save_every={self.save_every}: change one")
        if self.vocab_size is not None and self.vocab_size < 1:
            found.append(f"vocab_size is {self.vocab_size}: give at least 1, or leave it out")
        if shape is not None and self.seq_len > shape["n_positions"]:
            found.append(
                f"seq_len={self.seq_len} is longer than the model's n_positions={shape['n_positions']}: "
                "lower seq_len or raise n_positions"
            )
        if min(self.seq_len, self.global_batch_tokens, self.micro_batch_size) >= 1:
            try:
                accumulation_steps(self, world_size=world_size)
            except ValueError as error:
                found.append(str(error))
        return found


def accumulation_steps(recipe: Recipe, *, world_size: int) -> int:
    """Micro steps of one optimizer step: global_batch_tokens / (micro_batch_size * seq_len * world_size).

    Raises:
        ValueError: it does not divide; the micro batch sizes that do are named.
    """
    B, T, tokens = recipe.micro_batch_size, recipe.seq_len, recipe.global_batch_tokens
    if tokens % (B * T * world_size) == 0:
        return tokens // (B * T * world_size)
    problem = f"global_batch_tokens={tokens} is not a multiple of {B} * {T} * {world_size} = {B * T * world_size}"
    problem += " (micro_batch_size * seq_len * processes)"
    sequences, rest = divmod(tokens, T * world_size)
    if rest or not sequences:
        nearest = max(1, round(tokens / (T * world_size))) * T * world_size
        raise ValueError(f"{problem}: no micro batch size divides it; the nearest that works is {nearest}")
    divisors = [b for b in range(1, sequences + 1) if sequences % b == 0]
    raise ValueError(f"{problem}: give a micro_batch_size of {', '.join(map(str, divisors))}")
