"""The data of a run: its prepared dataset (prepared first if it is missing), training and validation batches."""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from gpt2repro.command import say
from gpt2repro.data.loader import Batch, Documents, TrainLoader, validation_batches, validation_tokens
from gpt2repro.data.mixture import MixtureOrder, MixtureStream, Order, Stream, shares_of
from gpt2repro.data.order import WindowOrder
from gpt2repro.data.prepare import prepare
from gpt2repro.data.published import is_published
from gpt2repro.data.shards import (
    Dataset,
    check_contents,
    load_tokenizer,
    open_dataset,
    tokenizer_record,
    tokenizer_sha256,
)  # fmt: skip
from gpt2repro.data.sources import HUB, open_source, was_made_from
from gpt2repro.data.stream import SPLITS
from gpt2repro.processes import on_every_process, on_main_process
from gpt2repro.recipe import Recipe

PREPARED_WHILE_OTHERS_WAIT = 1e8  # tokens: about three minutes


class TrainingData:
    """What a run reads: `loader` for training, `validation()`, the tokenizer, and the facts that identify the data.

    `sources` are the datasets of a mixture by folder, and `shares` their shares of the training windows. Without
    weights there is one, which all folders are.
    """

    def __init__(self, recipe: Recipe, dataset: Dataset, accelerator: Accelerator) -> None:
        self.recipe, self.dataset = recipe, dataset
        self.eot_id, self.fingerprint = dataset.eot_id, dataset.fingerprint
        self.tokenizer = load_tokenizer(dataset.tokenizer)
        recorded = {name: getattr(dataset, name) for name in ("tokenizer_sha256", "vocab_size", "eot_id")}
        if tokenizer_record(self.tokenizer) != recorded:
            where = dataset.tokenizer
            raise ValueError(f"the tokenizer in {where} is not the one that made its tokens: copy it again")
        self.tokenizer.model_max_length = recipe.shape()["n_positions"]  # of every checkpoint
        self.vocab_size = recipe.vocab_size or dataset.vocab_size
        if self.vocab_size < dataset.vocab_size:
            entries = f"the {dataset.vocab_size} entries of the dataset's tokenizer"
            raise ValueError(f"vocab_size={self.vocab_size} is smaller than {entries}: leave vocab_size out")
        masked = recipe.document_mask != "false"
        self.loader_options: dict[str, Any] = {
            "micro_batch_size": recipe.micro_batch_size, "vocab_size": self.vocab_size, "device": accelerator.device,
            "rank": accelerator.process_index, "world_size": accelerator.num_processes,
            "documents": Documents(self.eot_id, restart=recipe.document_mask == "restart") if masked else None,
        }
        mixed = recipe.dataset_weights
        self.sources = dict(zip(recipe.dataset_dir, dataset.parts, strict=True)) if mixed else {dataset.path: dataset}
        self.shares = [float(share) for share in shares_of(mixed or [1])]
        for source in self.sources.values() if recipe.eval_every else ():  # too few is an error now, not in an hour
            validation_tokens(source.split("val"), recipe.seq_len, recipe.eval_tokens)
        streams = [source.split("train") for source in self.sources.values()]
        orders = [
            WindowOrder(stream.tokens, recipe.seq_len, seed=recipe.seed, shuffle=recipe.shuffle) for stream in streams
        ]
        stream: Stream = MixtureStream(streams) if mixed else streams[0]
        order: Order = MixtureOrder(orders, mixed) if mixed else orders[0]
        sequences_per_step = recipe.global_batch_tokens // recipe.seq_len
        self.loader = TrainLoader(stream, order, sequences_per_step=sequences_per_step, **self.loader_options)

    def validation(self, source: Dataset) -> Iterator[Batch]:
        """This process's share of the validation windows of a source."""
        stream, recipe = source.split("val"), self.recipe
        return validation_batches(stream, seq_len=recipe.seq_len, max_tokens=recipe.eval_tokens, **self.loader_options)

    def tokens_seen(self, step: int) -> list[int]:
        """The tokens of each source that a run has trained on after `step` steps."""
        position, order = step * self.loader.sequences_per_step, self.loader.order
        windows = order.counts(position).tolist() if isinstance(order, MixtureOrder) else [position]
        return [count * self.recipe.seq_len for count in windows]

    def facts(self) -> dict[str, Any]:
        """What run.json records of the data."""
        # A mixture is made from none of its sources.
        tokens, source = self.loader.stream.tokens, None if len(self.sources) > 1 else self.dataset.info.get("source")
        identity = {"dir": self.recipe.dataset_dir, "fingerprint": self.fingerprint}
        return {**identity, "train_tokens": tokens, "source": source}


def open_data(recipe: Recipe, accelerator: Accelerator) -> TrainingData:
    """Open the recipe's dataset on every process; the main one prepares it first if the recipe names a source.

    Which files there are is decided on the main process: on a shared disk another may not see a new one yet.

    Raises:
        ValueError: what is missing, damaged, too small, or made from another source or with another tokenizer.
    """

    def opened() -> Dataset:
        _prepare_if_missing(recipe, world_size=accelerator.num_processes)
        return open_recipe_dataset(recipe)

    dataset = on_main_process(accelerator, opened)

    def opened_here() -> TrainingData:
        for shard in (shard for name in SPLITS for shard in dataset.shards[name]):
            shard.check()
        return TrainingData(recipe, dataset, accelerator)

    return on_every_process(opened_here)


def open_recipe_dataset(recipe: Recipe) -> Dataset:
    """The recipe's prepared dataset, compared with the recipe's source, tokenizer and val_tokens, and its contents."""
    dataset = open_dataset(list(recipe.dataset_dir), format=recipe.dataset_format, tokenizer=recipe.tokenizer)
    folder, wanted = recipe.dataset_dir[0], recipe.tokenizer
    advice = "give another dataset_dir to prepare, or leave it out of the recipe"
    info = dataset.info
    made_from, made_with = info.get("source"), info.get("tokenizer_name", info.get("tokenizer"))
    if recipe.source and made_from and not was_made_from(made_from, recipe.source, list(recipe.files)):
        files = f" {', '.join(recipe.files)}" if recipe.files else ""
        raise ValueError(f"source is {recipe.source}{files}, but {folder} was made from {made_from}: {advice}")
    if wanted and wanted not in (made_with, dataset.tokenizer) and not _is_tokenizer_of(wanted, dataset):
        raise ValueError(f"tokenizer is {wanted}, but {folder} has another one ({made_with}): {advice}")
    wanted_split, split = {"tokens": recipe.val_tokens}, info.get("validation")
    if recipe.val_tokens is not None and split != wanted_split:
        raise ValueError(f"the validation split is {wanted_split}, but {folder} was made with {split}: {advice}")
    return check_contents(dataset)


def _is_tokenizer_of(name: str, dataset: Dataset) -> bool:
    """Whether a tokenizer gives the dataset's ids. One that does not load is never one that was trained (train:N)."""
    trained = str(dataset.info.get("tokenizer")).startswith("train:")
    if (trained or name.startswith("train:")) and not Path(name).is_dir():
        return False  # both are named: they would have the same name
    try:
        return tokenizer_sha256(name) == dataset.tokenizer_sha256
    except ValueError as error:
        say(f"warning: {dataset.path} is taken to be made with {name}, which cannot be compared: {error}")
        return True


def preparation_command(recipe: Recipe) -> str:
    """The command that makes the recipe's dataset, for a shell."""
    words = ["python", "-m", "gpt2repro.data.prepare", "--source", str(recipe.source)]
    words += ["--files", *recipe.files] if recipe.files else []
    words += ["--val-tokens", str(recipe.val_tokens)] if recipe.val_tokens else []
    return shlex.join([*words, "--tokenizer", str(recipe.tokenizer), "--out", recipe.dataset_dir[0]])


def _prepare_if_missing(recipe: Recipe, *, world_size: int) -> None:
    """Make `dataset_dir` from the recipe's source; nothing large while other processes wait for it."""
    folder = recipe.dataset_dir[0]
    if not recipe.source or is_published(folder) or Path(os.path.expanduser(folder), "dataset.json").exists():
        return
    files, tokenizer = list(recipe.files) or None, str(recipe.tokenizer)
    if world_size > 1:
        if recipe.source in HUB or open_source(recipe.source, files=files).tokens > PREPARED_WHILE_OTHERS_WAIT:
            advice = f"{preparation_command(recipe)} --workers {os.cpu_count()}"
            raise ValueError(f"{folder} does not exist, and to prepare it takes longer than processes wait: {advice}")
    say(f"preparing {folder} from {recipe.source}")
    prepare(source=recipe.source, files=files, tokenizer=tokenizer, out=folder, val_tokens=recipe.val_tokens)
