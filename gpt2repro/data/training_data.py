"""The data of a run: its prepared dataset (prepared first if it is missing), training and validation batches."""

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
        self.recipe, self.dataset = recipe, dataset
        self.eot_id, self.fingerprint = dataset.eot_id, dataset.fingerprint
        self.tokenizer = load_tokenizer(dataset.tokenizer)
        if tokenizer_sha256(self.tokenizer) != dataset.tokenizer_sha256:
            where = dataset.tokenizer
            raise ValueError(f"the tokenizer in {where} is not the one that made its tokens: copy it again")
        self.vocab_size = recipe.vocab_size or dataset.vocab_size
        if self.vocab_size < dataset.vocab_size:
            entries = f"the {dataset.vocab_size} entries of the dataset's tokenizer"
            raise ValueError(f"vocab_size={self.vocab_size} is smaller than {entries}: leave vocab_size out")
        if recipe.eval_every:  # too few tokens are an error now, not in an hour
            validation_tokens(dataset.split("val"), recipe.seq_len, recipe.eval_tokens)
        self.share: dict[str, Any] = {
            "micro_batch_size": recipe.micro_batch_size, "vocab_size": self.vocab_size, "device": accelerator.device,
            "rank": accelerator.process_index, "world_size": accelerator.num_processes,
        }
        stream = dataset.split("train")
        order = WindowOrder(stream.tokens, recipe.seq_len, seed=recipe.seed, shuffle=recipe.shuffle)
        sequences_per_step = recipe.global_batch_tokens // recipe.seq_len
        self.loader = TrainLoader(stream, order, sequences_per_step=sequences_per_step, **self.share)

    def validation(self) -> Iterator[Batch]:
        """This process's share of the validation windows."""
        stream, recipe = self.dataset.split("val"), self.recipe
        return validation_batches(stream, seq_len=recipe.seq_len, max_tokens=recipe.eval_tokens, **self.share)

    def facts(self) -> dict[str, Any]:
        """What run.json records of the data."""
        tokens, source = self.loader.stream.tokens, self.dataset.info.get("source")
        identity = {"dir": self.recipe.dataset_dir, "fingerprint": self.fingerprint}
        return {**identity, "train_tokens": tokens, "source": source}


def open_data(recipe: Recipe, accelerator: Accelerator) -> TrainingData:
    """Open the recipe's dataset on every process; the main one prepares it first if the recipe names a source.

    Raises:
        ValueError: what is missing, damaged, too small, or made from another source or with another tokenizer.
    """
    # Decided on one process: on a shared disk another may not see a new file yet.
    on_main_process(accelerator, lambda: _prepare_if_missing(recipe, world_size=accelerator.num_processes))
    return TrainingData(recipe, open_recipe_dataset(recipe), accelerator)


def open_recipe_dataset(recipe: Recipe) -> Dataset:
    """The recipe's prepared dataset, compared with the recipe's source and tokenizer.

    A tokenizer of the Hub is compared as far as is possible without a network: it is never a trained one (train:N).
    """
    dataset = open_dataset(list(recipe.dataset_dir), format=recipe.dataset_format, tokenizer=recipe.tokenizer)
    folder, wanted = recipe.dataset_dir[0], recipe.tokenizer or ""
    advice = "give another dataset_dir to prepare, or leave it out of the recipe"
    made_from, made_with = dataset.info.get("source"), str(dataset.info.get("tokenizer", ""))
    if recipe.source and made_from and not was_made_from(made_from, recipe.source, list(recipe.files)):
        files = f" {', '.join(recipe.files)}" if recipe.files else ""
        raise ValueError(f"source is {recipe.source}{files}, but {folder} was made from {made_from}: {advice}")
    if wanted and os.path.isdir(os.path.expanduser(wanted)):
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
    folder = recipe.dataset_dir[0]
    if not recipe.source or Path(os.path.expanduser(folder), "dataset.json").exists():
        return
    if world_size > 1 and recipe.source not in ("python-docs", "files"):
        advice = f"{preparation_command(recipe)} --workers {os.cpu_count()}"
        raise ValueError(f"{folder} does not exist, and to prepare it takes longer than processes wait: {advice}")
    print(f"preparing {folder} from {recipe.source}")
    files, tokenizer = list(recipe.files) or None, str(recipe.tokenizer)
    prepare(source=recipe.source, files=files, tokenizer=tokenizer, out=folder, val_tokens=recipe.val_tokens)
