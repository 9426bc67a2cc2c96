"""Batches: the same global batch for every world size, the right next tokens, and a thread that always ends."""

import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2repro.data.loader import TrainLoader, validation_batches, validation_tokens
from gpt2repro.data.order import WindowOrder
from gpt2repro.data.shards import open_dataset
from gpt2repro.data.stream import TokenStream

IDS = np.random.default_rng(0).integers(0, 1000, 3217)
T = 16


@pytest.fixture
def stream(write_dataset: Callable[..., Path]) -> TokenStream:
    return open_dataset(write_dataset(IDS, vocab_size=1000, shard_tokens=500)).split("train")


def loader(stream: TokenStream, *, micro_batch_size: int = 4, vocab_size: int = 1000, **world: int) -> TrainLoader:
    order = WindowOrder(stream.tokens, T, seed=1)
    return TrainLoader(
        stream, order, sequences_per_step=24, micro_batch_size=micro_batch_size, vocab_size=vocab_size, **world
    )


def global_batch(stream: TokenStream, step: int, *, micro_batch_size: int, world_size: int) -> torch.Tensor:
    """All inputs of a step in order: micro step by micro step, rank by rank."""
    ranks = [
        loader(stream, micro_batch_size=micro_batch_size, rank=r, world_size=world_size) for r in range(world_size)
    ]
    iterators = [rank.batches(step) for rank in ranks]
    parts = [next(iterator)["input_ids"] for _ in range(ranks[0].accumulation) for iterator in iterators]
    for iterator in iterators:
        iterator.close()
    return torch.cat(parts)


def test_the_global_batch_is_the_same_for_every_world_size_and_micro_batch(stream: TokenStream) -> None:
    for step in 0, 8, 1000:  # 200 windows an epoch: step 8 straddles the first two
        expected = global_batch(stream, step, micro_batch_size=24, world_size=1)
        starts = loader(stream).window_starts(step)
        assert np.array_equal(expected.numpy(), IDS[(starts[:, None] + np.arange(T)) % len(IDS)])
        for micro_batch_size, world_size in (1, 1), (4, 2), (6, 4), (3, 8), (2, 3):
            got = global_batch(stream, step, micro_batch_size=micro_batch_size, world_size=world_size)
            assert torch.equal(got, expected), (step, micro_batch_size, world_size)


def test_targets_are_the_next_tokens(stream: TokenStream) -> None:
    batches = loader(stream).batches(0)
    starts = loader(stream).window_starts(0)[:4]
    input_ids, targets = next(batches).values()
    assert input_ids.dtype == targets.dtype == torch.int64 and input_ids.shape == (4, T)
    assert input_ids.is_contiguous() and targets.is_contiguous()
    assert np.array_equal(targets.numpy(), IDS[(starts[:, None] + 1 + np.arange(T)) % len(IDS)])


def test_starting_at_a_step_gives_the_batches_of_an_uninterrupted_run(stream: TokenStream) -> None:
    from_start = list(islice(loader(stream).batches(0), 6 * 12))
    resumed = list(islice(loader(stream).batches(7), 6 * 5))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(from_start[42:], resumed, strict=True) for name in a)


def test_an_epoch_of_batches_holds_every_window_once(stream: TokenStream) -> None:
    windows = stream.tokens // T
    starts = np.concatenate([loader(stream).window_starts(step) for step in range(windows)])  # 24 epochs
    for epoch in range(24):
        assert len(set(starts[epoch * windows : (epoch + 1) * windows].tolist())) == windows


@pytest.mark.parametrize(("micro_batch_size", "world_size"), [(5, 1), (4, 5), (48, 1), (0, 1)])
def test_a_batch_that_does_not_divide_is_refused(stream: TokenStream, micro_batch_size: int, world_size: int) -> None:
    with pytest.raises(
        ValueError, match=f"24 sequences a step do not divide into micro batches of {micro_batch_size}"
    ):
        loader(stream, micro_batch_size=micro_batch_size, world_size=world_size)


def test_an_id_past_the_vocabulary_is_named_with_its_file_and_position(write_dataset: Callable[..., Path]) -> None:
    ids = IDS.copy()
    ids[1234] = 1000
    stream = open_dataset(write_dataset(ids, vocab_size=1000, shard_tokens=500)).split("train")
    message = r"token id 1,000 at position 234 of .*train-00002.npy is past vocab_size 1,000"
    with pytest.raises(ValueError, match=message):
        list(islice(loader(stream).batches(0), 6 * 9))
    with pytest.raises(ValueError, match=message):
        list(validation_batches(stream, seq_len=T, max_tokens=10**6, micro_batch_size=4, vocab_size=1000))


def test_a_file_that_shrinks_during_a_run_is_an_error_in_the_consumer(stream: TokenStream) -> None:
    batches = loader(stream).batches(0)
    next(batches)
    for shard in stream.shards:
        with open(shard.path, "r+b") as file:
            file.truncate(200)
    with pytest.raises(ValueError, match="ends early"):
        list(islice(batches, 1000))


def test_closing_the_batches_ends_their_thread(stream: TokenStream) -> None:
    before = set(threading.enumerate())
    batches = loader(stream).batches(0)
    next(batches)
    (thread,) = set(threading.enumerate()) - before
    batches.close()
    assert not thread.is_alive()


def test_an_unfinished_loader_never_blocks_the_end_of_the_interpreter(dataset_folder: Path) -> None:
    program = f"""
from gpt2repro.data.loader import TrainLoader
from gpt2repro.data.order import WindowOrder
from gpt2repro.data.shards import open_dataset
dataset = open_dataset({str(dataset_folder)!r})
stream = dataset.split("train")
loader = TrainLoader(stream, WindowOrder(stream.tokens, 8, seed=0), sequences_per_step=4, micro_batch_size=4,
                     vocab_size=dataset.vocab_size)
batches = loader.batches(0)
print(next(batches)["input_ids"].shape)
raise SystemExit(7)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert (run.returncode, run.stdout) == (7, "torch.Size([4, 8])\n"), run.stderr


def test_training_from_shards_needs_none_of_the_preparation_packages(dataset_folder: Path) -> None:
    program = f"""
import sys
for name in ("datasets", "evaluate", "pyarrow", "tokenizers", "pandas", "matplotlib"):
    sys.modules[name] = None
from gpt2repro.data import loader, order, shards
assert shards.open_dataset({str(dataset_folder)!r}).split("val").tokens > 0
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr


def validation_windows(stream: TokenStream, max_tokens: int, micro_batch_size: int, world_size: int) -> list:
    """Every rank's batches: checked for shape and number, and the windows that they hold."""
    options = {"seq_len": T, "max_tokens": max_tokens, "micro_batch_size": micro_batch_size, "vocab_size": 1000}
    ranks = [list(validation_batches(stream, rank=r, world_size=world_size, **options)) for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1, "a rank with fewer batches would hang the others"
    windows = []
    for input_ids, targets in (batch.values() for batches in ranks for batch in batches):
        assert input_ids.shape == targets.shape == (micro_batch_size, T)
        real = (targets != -100).all(dim=1)
        assert (targets[~real] == -100).all()
        windows += torch.cat([input_ids, targets], dim=1)[real].tolist()
    return sorted(windows)


def test_validation_is_the_same_windows_for_every_world_size(stream: TokenStream) -> None:
    expected = [[*IDS[k * T : k * T + T], *IDS[k * T + 1 : k * T + T + 1]] for k in range(62)]
    for micro_batch_size, world_size in (62, 1), (1, 1), (8, 1), (5, 3), (64, 2), (10, 7):
        assert validation_windows(stream, 62 * T + 3, micro_batch_size, world_size) == sorted(expected)
    assert validation_tokens(stream, T, 62 * T + 3) == 62 * T


def test_validation_does_not_wrap_around(write_dataset: Callable[..., Path]) -> None:
    stream = open_dataset(write_dataset(IDS[:160], vocab_size=1000)).split("train")
    assert validation_tokens(stream, T, 10**6) == 9 * T  # the tenth window's last target would be token 0
    assert len(validation_windows(stream, 10**6, 4, 1)) == 9


def test_no_whole_validation_window_is_an_error(stream: TokenStream) -> None:
    with pytest.raises(ValueError, match=r"no validation window: 3,217 validation tokens and at most 15"):
        validation_tokens(stream, T, 15)
