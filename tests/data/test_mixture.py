"""Mixtures: every prefix has the weights, every source its own order, and a run of several datasets resumes."""

import json
import shutil
import time
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from eval.validation import validation_loss
from gpt2repro.data.loader import Documents, TrainLoader, validation_batches
from gpt2repro.data.mixture import MixtureOrder, MixtureStream, make_pattern
from gpt2repro.data.order import WindowOrder
from gpt2repro.data.prepare import prepare
from gpt2repro.data.shards import open_dataset
from tests.conftest import end, kill, train_rows
from tests.test_train import assert_same_bits

T = 16
WEIGHTS = [
    (0.7, 0.3), (1, 2), (0.001, 0.999), (5, 3, 2, 1), (1,) * 7, (0.5, 0.45, 0.05), (0.125, 0.333, 0.542), (1e9, 3e9),
    (0.9, 0.05, 0.03, 0.01, 0.01),
]  # fmt: skip


def order_of(tokens, weights, **options) -> MixtureOrder:
    return MixtureOrder([WindowOrder(count, T, seed=1, **options) for count in tokens], weights)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_after_any_number_of_windows_every_source_is_within_one_of_its_weight(weights):
    order = order_of([1000 + 16 * k for k in range(len(weights))], weights)
    whole = [Fraction(str(weight)) for weight in weights]
    for first in 0, 10**9 - 7, 10**12:
        for position in (*range(first, first + 300), first + len(order.pattern)):
            counts = order.counts(position)
            assert counts.sum() == position
            for count, weight in zip(counts.tolist(), whole, strict=True):
                assert abs(count - position * weight / sum(whole)) < 1


def test_a_mixture_reads_each_source_in_the_order_of_a_run_on_that_source_alone():
    order = order_of([1003, 517, 2000], (5, 3, 2))
    starts = order.starts(0, 4000)
    for first, tokens, share in ((0, 1003, 0.5), (1003, 517, 0.3), (1520, 2000, 0.2)):
        own = starts[(first <= starts) & (starts < first + tokens)] - first
        assert len(own) == 4000 * share
        assert np.array_equal(own, WindowOrder(tokens, T, seed=1).starts(0, len(own)))


def test_any_part_of_the_order_is_that_part_of_the_whole():
    order = order_of([1003, 517], (0.7, 0.3))
    whole = order.starts(0, 900)
    for first, count in (0, 1), (3, 7), (95, 420), (899, 1):
        assert np.array_equal(order.starts(first, count), whole[first : first + count])


def test_position_a_billion_costs_what_position_0_does():
    order = order_of([10**11, 10**9], (0.7, 0.3))
    began = time.process_time()
    starts = order.starts(10**9 * 512, 512)
    assert time.process_time() - began < 0.1
    assert np.sum(starts < 10**11) in (358, 359)


def test_weights_that_repeat_too_late_are_one_error():
    with pytest.raises(ValueError, match=r"\[0.1234567, 0.8765433\], more than 100,000 windows until"):
        make_pattern((0.1234567, 0.8765433))


# ---- batches -------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(write_dataset):
    """Two datasets of other ids: 0 to 499 and 500 to 999."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 500, 1017), rng.integers(500, 1000, 513)]
    return ids, [open_dataset(write_dataset(each, vocab_size=1000, shard_tokens=400)).split("train") for each in ids]


def loader(streams, *, micro_batch_size=4, **world) -> TrainLoader:
    order = order_of([stream.tokens for stream in streams], (0.7, 0.3))
    options = {"sequences_per_step": 24, "micro_batch_size": micro_batch_size, "vocab_size": 1000, **world}
    return TrainLoader(MixtureStream(streams), order, **options)


def test_one_two_and_eight_processes_read_the_same_windows_of_a_mixture(sources):
    ids, streams = sources
    for step in 0, 7, 1000:
        starts = loader(streams).window_starts(step)
        expected = []
        for start in starts.tolist():  # a window stays in the circle of its source
            source, own = (0, start) if start < 1017 else (1, start - 1017)
            expected.append(ids[source][(own + np.arange(T)) % len(ids[source])])
        for world_size, micro_batch_size in (1, 24), (1, 4), (2, 4), (8, 3), (8, 1):
            ranks = [
                loader(streams, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size).batches(step)
                for rank in range(world_size)
            ]
            rounds = range(24 // world_size // micro_batch_size)
            parts = [next(batches)["input_ids"] for _ in rounds for batches in ranks]
            for batches in ranks:
                batches.close()
            assert np.array_equal(torch.cat(parts).numpy(), np.stack(expected))


def test_a_resumed_mixture_reads_what_an_unbroken_one_does(sources):
    _, streams = sources
    unbroken = list(islice(loader(streams).batches(0), 6 * 12))
    resumed = list(islice(loader(streams).batches(7), 6 * 5))
    for found, expected in zip(resumed, unbroken[42:], strict=True):
        assert torch.equal(found["input_ids"], expected["input_ids"])


def test_an_id_past_the_vocabulary_is_found_in_its_source(write_dataset):
    bad = np.arange(600) % 1000
    bad[2] = 1000
    parts = (np.arange(500), bad)
    streams = [open_dataset(write_dataset(ids, vocab_size=1001, shard_tokens=100)).split("train") for ids in parts]
    with pytest.raises(ValueError, match=r"token id 1,000 at position 2 of .*dataset-1/train-00000.npy is past"):
        list(islice(loader(streams).batches(0), 6 * 20))


# ---- runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def second_dataset(tiny_dataset, tmp_path_factory):
    """A text that python-docs has not, with its tokenizer."""
    folder = tmp_path_factory.mktemp("second")
    for part in range(40):
        rows = (f"{n} times {part} is {n * part}, which is what we expect.\n" for n in range(part, part + 20))
        (folder / f"{part}.txt").write_text("".join(rows))
    files, tokenizer = [str(folder / "*.txt")], str(tiny_dataset)
    return prepare(source="files", files=files, tokenizer=tokenizer, out=folder / "out", val_fraction=0.2)


@pytest.fixture(scope="module")
def mixture(tiny_dataset, second_dataset) -> dict:
    folders = (tiny_dataset, second_dataset)
    return {"dataset_dir": folders, "dataset_weights": (0.7, 0.3), "document_mask": "restart"}


@pytest.fixture(scope="module")
def mixture_run(train_script, mixture, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("mixture") / "run"
    run_dir.with_suffix(".log").write_text(train_script(run_dir, **mixture))
    return run_dir


def source_rows(run_dir, step) -> dict[str, dict]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {row["source"]: row for row in rows if row["kind"] == "val_source" and row["step"] == step}


def test_the_losses_by_source_are_those_of_each_dataset_alone(mixture_run, mixture):
    model = AutoModelForCausalLM.from_pretrained(mixture_run / "latest", trust_remote_code=True)
    rows, mean = source_rows(mixture_run, 8), 0.0
    for folder, share, tokens in zip(mixture["dataset_dir"], (0.7, 0.3), (45 * 32, 19 * 32), strict=True):
        dataset, row = open_dataset(folder), rows[str(folder)]
        documents = Documents(dataset.eot_id, restart=True)
        batches = validation_batches(
            dataset.split("val"), seq_len=32, max_tokens=1024, micro_batch_size=4, vocab_size=512, documents=documents
        )
        loss, counted = validation_loss(model, batches)
        assert (row["loss"], row["eval_tokens"]) == (pytest.approx(loss, abs=1e-5), counted)
        assert row["tokens"] == tokens  # of 8 steps of 8 windows
        assert row["epochs"] == pytest.approx(tokens / dataset.split("train").tokens)
        mean += share * loss
    assert train_rows(mixture_run, "val")[8]["loss"] == pytest.approx(mean, abs=1e-5)
    line = f"step      8    on {folder}: {row['loss']:.4f} after 608 tokens, "
    assert line in mixture_run.with_suffix(".log").read_text()


def test_two_processes_train_on_a_mixture_with_masked_documents_as_one_does(
    mixture_run, train_script, mixture, tmp_path
):
    train_script(tmp_path / "run", processes=2, **mixture)
    assert_same_bits(tmp_path / "run", mixture_run)
    assert source_rows(tmp_path / "run", 8) == source_rows(mixture_run, 8)


def test_a_killed_run_of_a_mixture_with_masked_documents_resumes_bit_exactly(
    mixture_run, train_script, mixture, tmp_path
):
    process = train_script.start_paused(tmp_path / "run", "step 5", **mixture)
    kill(process)
    end(process)
    assert "resumed from" in train_script(tmp_path / "run", **mixture)
    assert_same_bits(tmp_path / "run", mixture_run)
    other = {**mixture, "dataset_weights": (0.6, 0.4), "document_mask": "true"}
    refused = train_script(shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=True), exit_code=1, **other)
    assert "dataset_weights is [0.7, 0.3] there and [0.6, 0.4] here" in refused
    assert "document_mask is 'restart' there and 'true' here" in refused
