"""The data of a run: its prepared dataset (made first where it is missing), training batches, validation batches."""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from gpt2repro.data.loader import Batch, TrainLoader, validation_batches, validation_tokens
from gpt2repro.data.order import WindowOrder
from gpt2repro.data.prepare import prepare
from gpt2repro.data.shards import Dataset, load_tokenizer, open_dataset, tokenizer_sha256
from gpt2repro.data.sources import was_made_from
from gpt2repro.processes import on_main_process
from gpt2repro.recipe import Recipe


class TrainingData:
    """What a run reads: `loader` for training, `validation()`, the tokenizer, and the facts that identify the data."""

    def __init__(self, recipe: Recipe, dataset: Dataset, accelerator: Accelerator) -> None:
        self.recipe, self.dataset, self.accelerator = recipe, dataset, accelerator
        self.tokenizer = load_tokenizer(dataset.tokenizer)
        if tokenizer_sha256(self.tokenizer) != dataset.tokenizer_sha256:
            where = dataset.tokenizer
            raise ValueError(f"the tokenizer in {where} is not the one that made its tokens: copy it again")
        self.vocab_size = recipe.vocab_size or dataset.vocab_size
        if self.vocab_size < dataset.vocab_size:
            raise ValueError(
                f"vocab_size={self.vocab_size} is smaller than the {dataset.vocab_size} entries of the dataset's "
                "tokenizer: leave vocab_size out"
            )
        if recipe.eval_every:  # too few tokens are an error now, not in an hour
            validation_tokens(dataset.split("val"), recipe.seq_len, recipe.eval_tokens)
        stream = dataset.split("train")
        self.loader = TrainLoader(
            stream, WindowOrder(stream.tokens, recipe.seq_len, seed=recipe.seed, shuffle=recipe.shuffle),
            sequences_per_step=recipe.global_batch_tokens // recipe.seq_len,
            micro_batch_size=recipe.micro_batch_size, vocab_size=self.vocab_size, rank=accelerator.process_index,
            world_size=accelerator.num_processes, device=accelerator.device,
        )  # fmt: skip

    eot_id = property(lambda self: self.dataset.eot_id)
    fingerprint = property(lambda self: self.dataset.fingerprint)

    def validation(self) -> Iterator[Batch]:
        """This process's share of the validation windows."""
        return validation_batches(
            self.dataset.split("val"), seq_len=self.recipe.seq_len, max_tokens=self.recipe.eval_tokens,
            micro_batch_size=self.recipe.micro_batch_size, vocab_size=self.vocab_size,
            rank=self.accelerator.process_index, world_size=self.accelerator.num_processes,
            device=self.accelerator.device,
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """What run.json keeps of the data."""
        return {
            "dir": self.recipe.dataset_dir, "fingerprint": self.fingerprint,
            "train_tokens": self.loader.stream.tokens, "source": self.dataset.info.get("source"),
        }  # fmt: skip


def open_data(recipe: Recipe, accelerator: Accelerator) -> TrainingData:
    """Open the recipe's dataset on every process; the main one makes it first, where the recipe says from what.

    Raises:
        ValueError: what is missing, damaged, too small, or made from another source or with another tokenizer.
    """
    # Decided on one process: on a shared disk another may not see a new file yet.
    on_main_process(accelerator, lambda: _prepare_if_missing(recipe, world_size=accelerator.num_processes))
    return TrainingData(recipe, open_recipe_dataset(recipe), accelerator)


def open_recipe_dataset(recipe: Recipe) -> Dataset:
    """The recipe's prepared dataset, compared with the recipe's source and tokenizer.

    A tokenizer of the Hub is compared as far as it can be without a network: a trained one is never one of those.
    """
    dataset = open_dataset(list(recipe.dataset_dir), format=recipe.dataset_format, tokenizer=recipe.tokenizer)
    folder, wanted = recipe.dataset_dir[0], recipe.tokenizer or ""
    advice = "give another dataset_dir to prepare, or leave it out of the recipe"
    made_from, made_with = dataset.info.get("source"), str(dataset.info.get("tokenizer", ""))
    if recipe.source and made_from and not was_made_from(made_from, recipe.source, list(recipe.files)):
        files = f" {', '.join(recipe.files)}" if recipe.files else ""
        raise ValueError(f"source is {recipe.source}{files}, but {folder} was made from {made_from}: {advice}")
    if wanted and Path(wanted).is_dir():
        same = tokenizer_sha256(wanted) == dataset.tokenizer_sha256
    else:
        same = not wanted or wanted == made_with or "train:" not in wanted + made_with
    if not same:
        raise ValueError(f"tokenizer is {wanted}, but {folder} has another one ({made_with or 'named'}): {advice}")
    return dataset


def preparation_command(recipe: Recipe) -> str:
    """The command that makes the recipe's dataset, for a shell."""
    words = ["python", "-m", "gpt2repro.data.prepare", "--source", str(recipe.source)]
    words += ["--files", *recipe.files] if recipe.files else []
    words += ["--val-tokens", str(recipe.val_tokens)] if recipe.val_tokens else []
    return shlex.join([*words, "--tokenizer", str(recipe.tokenizer), "--out", recipe.dataset_dir[0]])


def _prepare_if_missing(recipe: Recipe, *, world_size: int) -> None:
    """Make `dataset_dir` from the recipe's source; not from the Hub while other processes wait for it."""
    if not recipe.source or (Path(recipe.dataset_dir[0]) / "dataset.json").exists():
        return
    if world_size > 1 and recipe.source not in ("python-docs", "files"):
        raise ValueError(
            f"{recipe.dataset_dir[0]} does not exist, and making it takes longer than processes wait for each other: "
            f"{preparation_command(recipe)} --workers {os.cpu_count()}"
        )
    print(f"preparing {recipe.dataset_dir[0]} from {recipe.source}")
    prepare(
        source=recipe.source, files=list(recipe.files) or None, tokenizer=str(recipe.tokenizer),
        out=recipe.dataset_dir[0], val_tokens=recipe.val_tokens,
    )  # fmt: skip
