"""The recipe: all that defines a training run. Its fields, and what can be wrong with their values.

    recipe = Recipe(max_steps=100, learning_rate=1e-3)
    recipe.check(world_size=8)

recipe_parser.py makes a recipe from YAML and flags.
"""

import math
import re
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# A run is the same run as long as these hold; anything else (micro-batch, precision, cadence) may change on resume.
DEFINING_FIELDS = (
    "model", "n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "dropout", "init_from", "seq_len",
    "global_batch_tokens", "max_steps", "optimizer", "learning_rate", "muon_learning_rate", "embedding_lr_ratio",
    "vector_lr_ratio", "min_lr_ratio", "warmup_steps", "schedule", "decay_ratio", "weight_decay", "muon_weight_decay",
    "muon_cautious_decay", "beta1", "beta2", "muon_momentum", "muon_split_qkv", "muon_normalise_rows", "ema_decay",
    "grad_clip", "seed", "shuffle", "dataset_weights", "document_mask",
)  # fmt: skip
HUB_BRANCH = re.compile(r"hf://([^/@:]+/[^/@:]+)@(?!main/?$)([^/@:]+)/?")  # repository and branch
TRACKERS = ("tensorboard", "wandb", "trackio")
CHOICES = {
    "dataset_format": ("auto", "gpt2repro", "build-nanogpt", "llm.c", "nanogpt", "datatrove"),
    "document_mask": ("false", "true", "restart"),
    "optimizer": ("adamw", "muon"),
    "schedule": ("cosine", "constant", "wsd_linear", "wsd_sqrt", "wsd_concave"),
    "on_bad_step": ("skip", "stop"),
    "mixed_precision": ("auto", "no", "bf16", "fp16"),
    "compile": ("auto", "true", "false"),
    "compile_mode": ("default", "max-autotune-no-cudagraphs"),
    "attn_implementation": ("sdpa", "eager", "flash_attention_2", "flex_attention"),
    "loss_impl": ("auto", "plain", "chunked"),
}


def _option(default: Any, help_line: str, *, least: float = -math.inf, most: float = math.inf) -> Any:
    return field(default=default, metadata={"help": help_line, "least": least, "most": most})


@dataclass(frozen=True)
class Recipe:
    """All that defines a run. The defaults are the reproduction: 10B tokens in 19,073 steps of 524,288."""

    # where
    output_dir: str = _option("runs/gpt2-124m", "folder of the run: checkpoints, metrics.jsonl, run.json")
    dataset_dir: tuple[str, ...] = _option(("data/fineweb-edu-10b",), "prepared datasets, or hf://datasets/OWNER/NAME")
    dataset_weights: tuple[float, ...] = _option((), "a weight for each dataset_dir of a mixture; none: one stream")
    dataset_format: str = _option("auto", "format of dataset_dir; nanoGPT's .bin must be named")
    source: str | None = _option(None, "source of a new dataset_dir: python-docs, files, text, fineweb-edu, …")
    files: tuple[str, ...] = _option((), "paths or globs for source: files or text")
    tokenizer: str | None = _option(None, "folder, Hub id, or train:N for a byte-level BPE of N entries")
    val_tokens: int | None = _option(None, "validation tokens of a new dataset (default: a share by document hash)")
    # the model
    model: str = _option("gpt2", "gpt2, gpt2-medium, gpt2-large, gpt2-xl, demo; init_from is its checkpoint's shape")
    n_layer: int | None = _option(None, "blocks, instead of the named shape's")
    n_head: int | None = _option(None, "attention heads, instead of the named shape's")
    n_embd: int | None = _option(None, "channels, instead of the named shape's")
    n_positions: int | None = _option(None, "longest sequence in tokens, instead of the named shape's")
    vocab_size: int | None = _option(None, "token ids, instead of the tokenizer's number of entries", least=1)
    dropout: float = _option(0.0, "probability on embeddings, attention and residuals")
    init_from: str | None = _option(None, "checkpoint (ours, stock GPT-2, nanoGPT's .pt) whose weights start the run")
    # the batch
    seq_len: int = _option(1024, "tokens in a sequence (T)", least=1)
    document_mask: str = _option("false", "a token sees only its own document; restart: positions begin anew in each")
    global_batch_tokens: int = _option(524_288, "tokens in an optimizer step, over all processes", least=1, most=2**32)
    micro_batch_size: int = _option(16, "sequences per process and micro-step (B): what fits the memory", least=1)
    max_steps: int = _option(19_073, "optimizer steps", least=1)
    max_minutes: float = _option(0.0, "lower max_steps to what the machine does in them; 0: no", least=0, most=1e6)
    # the optimizer
    optimizer: str = _option("adamw", "muon is Muon for the matrices of the blocks and AdamW for the rest")
    learning_rate: float = _option(6e-4, "peak learning rate", least=0)
    muon_learning_rate: float | None = _option(None, "peak rate of Muon's matrices, instead of learning_rate")
    embedding_lr_ratio: float = _option(1.0, "rate of both embeddings as a multiple of learning_rate", least=0)
    vector_lr_ratio: float = _option(1.0, "rate of biases and LayerNorms as a multiple of learning_rate", least=0)
    min_lr_ratio: float = _option(0.1, "lowest rate of the schedule, as a share of the peak")
    warmup_steps: int = _option(715, "steps of linear warm-up", least=0)
    schedule: str = _option("cosine", "what follows the warm-up")
    decay_ratio: float = _option(0.2, "share of max_steps that the decay of a wsd_… schedule takes, at the end")
    weight_decay: float = _option(0.1, "decay of tensors with two or more dimensions", least=0)
    muon_weight_decay: float | None = _option(None, "decay of Muon's matrices, instead of weight_decay", least=0)
    muon_cautious_decay: bool = _option(False, "decay only those weights of Muon's that the update makes smaller")
    beta1: float = _option(0.9, "AdamW beta1")
    beta2: float = _option(0.95, "AdamW beta2")
    muon_momentum: float = _option(0.95, "Muon's momentum")
    muon_split_qkv: bool = _option(False, "orthogonalise the updates of query, key and value each by itself")
    muon_normalise_rows: bool = _option(False, "give the rows of Muon's updates the same running size (NorMuon)")
    ema_decay: float = _option(0.0, "decay of the moving average of the weights, evaluated and saved too; 0: none")
    grad_clip: float = _option(1.0, "largest gradient norm; 0 turns clipping off", least=0)
    on_bad_step: str = _option("skip", "what a loss or gradient norm that is not finite, or a zero norm, does")
    outlier_z: float = _option(0.0, "standard deviations above the last 128 steps that are bad; 0: none", least=0)
    max_bad_steps: int = _option(10, "bad steps in a row after which the run stops in any case", least=1)
    # randomness
    seed: int = _option(1337, "seed of the initialisation, the data order and dropout", least=0)
    shuffle: bool = _option(True, "a new permutation of all windows every epoch; false reads them in order")
    # speed and memory
    mixed_precision: str = _option("auto", "auto takes the launcher's, else the device's best")
    compile: str = _option("auto", "torch.compile; auto takes the launcher's, else the device's choice")
    compile_mode: str = _option("default", "mode of torch.compile; the other tries more kernels")
    attn_implementation: str = _option("sdpa", "attention kernels")
    loss_impl: str = _option("auto", "chunked holds the logits of an eighth of the tokens; auto: on accelerators")
    gradient_checkpointing: bool = _option(False, "recompute activations: less memory, about a third more time")
    profile_steps: int = _option(0, "steps to profile after the first four, into output_dir/profile.json", least=0)
    # cadence
    eval_every: int = _option(250, "steps between validations; 0 is never", least=0)
    eval_tokens: int = _option(10_485_760, "tokens in a validation (build-nanogpt: 20 batches of 524,288)", least=1)
    eval_tasks: tuple[str, ...] = _option((), "benchmarks at every validation: TASK[:STYLE][:LIMIT][=FILE] …")
    sample_every: int = _option(250, "steps between samples; 0 is never", least=0)
    sample_prompt: str = _option("Hello, I'm a language model,", "prompt of the samples")
    sample_tokens: int = _option(32, "new tokens in a sample", least=1)
    num_samples: int = _option(4, "samples at a time", least=1)
    save_every: int = _option(1000, "steps between checkpoints; the last step is always saved", least=1)
    keep_last: int = _option(2, "newest checkpoints that are kept; 0 keeps all", least=0)
    keep_every: int = _option(0, "steps between checkpoints that are never deleted; 0 is none", least=0)
    patience: int = _option(0, "validations without a new best after which the run ends; 0: never", least=0)
    watchdog_minutes: float = _option(30.0, "minutes without a step until the run ends; 0 is never", least=0, most=1e6)
    log_with: tuple[str, ...] = _option((), "trackers beside metrics.jsonl: tensorboard, wandb, trackio")
    hub_repo_id: str | None = _option(None, "OWNER/NAME on the Hub, to which the run pushes checkpoints")
    hub_every: int = _option(0, "steps between pushes, a multiple of save_every; 0 pushes only the last one", least=0)
    hub_state: bool = _option(False, "mirror every checkpoint to the branch `state` of hub_repo_id, to resume from")
    mirror: str | None = _option(None, "URL (hf://OWNER/NAME@BRANCH, s3://…) that gets a copy of every checkpoint")
    resume: str = _option("auto", "auto, never, previous (the checkpoint before the newest), or a checkpoint's path")

    def shape(self) -> dict[str, Any]:
        """Sizes of the named model with the recipe's overrides; ValueError for an unknown name."""
        from configuration_gpt2repro import NAMED_SHAPES  # imports transformers, for which --help need not wait

        named = {**NAMED_SHAPES, "init_from": {}}  # there the checkpoint gives the sizes (hub/initial.py)
        if self.model not in named:
            raise ValueError(f"model is {self.model!r}: give one of {', '.join(named)}")
        overrides = {name: getattr(self, name) for name in ("n_layer", "n_head", "n_embd", "n_positions")}
        given = {name: value for name, value in overrides.items() if value is not None}
        return {"n_positions": 1024, **named[self.model], **given}

    def check(self, *, world_size: int = 1) -> None:
        """Raise ValueError with everything that is wrong, a line each, before anything is loaded or written.

        The model's shape is checked once the rest is right: it needs transformers, which takes seconds to import.
        """
        problems = [*self._field_problems(), *self._combination_problems(), *self._batch_problems(world_size)]
        if problems := problems or [*self._shape_problems()]:
            raise ValueError("\n".join(problems))

    def _field_problems(self) -> typing.Iterator[str]:
        for item in fields(self):
            value, least, most = getattr(self, item.name), item.metadata["least"], item.metadata["most"]
            if item.name in CHOICES and value not in CHOICES[item.name]:
                yield f"{item.name} is {value!r}: give one of {', '.join(CHOICES[item.name])}"
            if isinstance(value, int | float) and not least <= value <= most:
                yield f"{item.name} is {value}: give at {f'least {least}' if value < least else f'most {most}'}"
        for name in self.log_with:
            if name not in TRACKERS:
                yield f"log_with is {name!r}: give one of {', '.join(TRACKERS)}"
        for name in ("beta1", "beta2", "muon_momentum", "ema_decay", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}: give a number from 0 to below 1"
        if not 0 <= self.min_lr_ratio <= 1:
            yield f"min_lr_ratio is {self.min_lr_ratio}: give a number from 0 to 1"
        if not 0 < self.decay_ratio <= 1:
            yield f"decay_ratio is {self.decay_ratio}: give a number above 0, up to 1"

    def _combination_problems(self) -> typing.Iterator[str]:
        if not self.output_dir:
            yield "output_dir is empty: give a folder"
        warmup, steps = self.warmup_steps, self.max_steps
        if self.schedule.startswith("wsd") and warmup > (1 - self.decay_ratio) * steps:
            decay = f"a decay over decay_ratio={self.decay_ratio} of max_steps={steps}"
            yield f"warmup_steps={warmup} and {decay} overlap: lower one of them"
        for name in (item.name for item in fields(self) if item.name.startswith("muon_")):
            if self.optimizer != "muon" and (value := getattr(self, name)) != getattr(Recipe, name):
                yield f"{name} is {value} with optimizer {self.optimizer}: give optimizer: muon, or leave it out"
        if self.optimizer == "muon" and not self.learning_rate > 0:
            yield f"learning_rate is {self.learning_rate}: muon's is a multiple of it, give a number above 0"
        if warmup >= steps > 0:
            yield f"warmup_steps={warmup} leaves nothing of max_steps={steps}: lower it"
        if self.model == "init_from" and not self.init_from:
            yield "model is init_from without an init_from: give a checkpoint, or a named shape"
        if len(self.dataset_dir) != 1 and (self.source or not self.dataset_dir):
            yield f"dataset_dir names {len(self.dataset_dir)} folders: give one to make from source, or no source"
        yield from self._mixture_problems()
        if self.document_mask != "false" and self.attn_implementation == "flash_attention_2":
            kernels = f"document_mask is {self.document_mask} with attn_implementation flash_attention_2"
            yield f"{kernels}, which gets no mask of documents: give sdpa or flex_attention"
        if self.source and not self.tokenizer:
            yield "a source without a tokenizer: give a folder, a Hub id, or train:N"
        if (self.source in ("files", "text")) != bool(self.files):
            yield f"source is {self.source} and files names {len(self.files)}: they go together, --source files"
        if self.profile_steps > 0 and self.profile_steps + 4 > steps:
            yield f"profile_steps={self.profile_steps} follow 4 other steps, max_steps={steps} is less: lower them"
        if self.eval_tasks and not self.eval_every:
            yield "eval_tasks are scored at every validation, but eval_every is 0: give a number of steps"
        if self.patience and (not self.eval_every or self.eval_every % max(1, self.save_every)):
            every = f"eval_every={self.eval_every} is no multiple of save_every={self.save_every}"
            yield f"patience keeps the checkpoint of the best validation, but {every}: change one"
        if self.hub_every and not self.hub_repo_id:
            yield f"hub_every is {self.hub_every} without a hub_repo_id: give OWNER/NAME, or leave it out"
        if self.hub_state and "/" not in (self.hub_repo_id or ""):
            yield f"hub_state is true and hub_repo_id is {self.hub_repo_id}: give OWNER/NAME, or no hub_state"
        if self.mirror is not None:
            yield from self._mirror_problems(self.mirror)
        for name in ("hub_every", "keep_every"):
            if getattr(self, name) % max(1, self.save_every):
                yield f"{name}={getattr(self, name)} is not a multiple of save_every={self.save_every}: change one"

    def _mixture_problems(self) -> typing.Iterator[str]:
        weights, folders = self.dataset_weights, self.dataset_dir
        if not all(0 < weight < math.inf for weight in weights):
            yield f"dataset_weights is {[*weights]}: give numbers above 0"
        if weights and len(weights) != len(folders):
            yield f"dataset_weights has {len(weights)} numbers for {len(folders)} folders: give one each"
        elif len(weights) == 1:
            yield "dataset_weights is one number, and a single dataset needs none: leave it out"
        elif weights and len(set(folders)) < len(folders):
            yield f"dataset_dir is {', '.join(folders)}: give every folder of a mixture once"

    def _mirror_problems(self, mirror: str) -> typing.Iterator[str]:
        url = urlsplit(mirror)
        if url.password or url.query:  # it would stand in run.json, and must not stand in an error either
            yield "mirror has a password or a query in it: give credentials as the store's library expects them"
            return
        if self.hub_state:
            yield f"mirror is {mirror!r} and hub_state is true, which is a mirror on the Hub: give one of them"
        if url.scheme in ("", "memory") or not url.netloc + url.path.strip("/"):
            yield f"mirror is {mirror!r}: give a URL (hf://OWNER/NAME@BRANCH, s3://BUCKET/FOLDER, file:///FOLDER)"
        if url.scheme == "hf" and not mirror.startswith("hf://buckets/") and not HUB_BRANCH.fullmatch(mirror):
            yield f"mirror is {mirror!r}: give a branch beside main, hf://OWNER/NAME@BRANCH"
        if url.scheme in ("file", "local") and Path(self.output_dir).resolve() == Path(url.path).resolve():
            yield f"mirror {mirror!r} is output_dir: give another folder, on a disk that outlives this machine"

    def mirror_url(self) -> str | None:
        """Where every checkpoint is copied to."""
        return f"hf://{self.hub_repo_id}@state" if self.hub_state else self.mirror

    def _batch_problems(self, world_size: int) -> typing.Iterator[str]:
        if min(self.seq_len, self.global_batch_tokens, self.micro_batch_size) >= 1:
            try:
                self.accumulation_steps(world_size)
            except ValueError as error:
                yield str(error)

    def _shape_problems(self) -> typing.Iterator[str]:
        from huggingface_hub.errors import StrictDataclassError

        from configuration_gpt2repro import GPT2ReproConfig

        try:
            shape = self.shape()
        except ValueError as error:
            yield str(error)
            return
        if self.model == "init_from" and self.n_positions is None:
            return  # the sizes are not known yet
        if self.seq_len > shape["n_positions"]:
            longer = f"seq_len={self.seq_len} is longer than the model's n_positions={shape['n_positions']}"
            yield f"{longer}: lower seq_len or raise n_positions"
        try:
            GPT2ReproConfig(**shape)
        except StrictDataclassError as error:
            yield from str(error).split("ValueError: ")[-1].splitlines()

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-steps in an optimizer step: global_batch_tokens / (micro_batch_size * seq_len * world_size).

        Raises:
            ValueError: it does not divide; the micro-batch sizes that do are named.
        """
        B, T, tokens = self.micro_batch_size, self.seq_len, self.global_batch_tokens
        if tokens % (B * T * world_size) == 0:
            return tokens // (B * T * world_size)
        problem = f"global_batch_tokens={tokens} is not a multiple of {B} * {T} * {world_size} = {B * T * world_size}"
        problem += " (micro_batch_size * seq_len * processes)"
        sequences, rest = divmod(tokens, T * world_size)
        if rest or not sequences:
            nearest = max(1, round(tokens / (T * world_size))) * T * world_size
            raise ValueError(f"{problem}: no micro batch size divides it; the nearest that works is {nearest}")
        divisors = [b for b in range(1, min(sequences, 2**16) + 1) if sequences % b == 0]
        raise ValueError(f"{problem}: give a micro_batch_size of {', '.join(map(str, divisors))}")
