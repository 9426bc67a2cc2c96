"""The order of training: each window once an epoch, uniformly, as a function of (seed, position) alone."""

import time
import tracemalloc

import numpy as np
import pytest

from gpt2repro.data.order import WindowOrder


@pytest.mark.parametrize("windows", [1, 2, 3, 7, 64, 1000, 4097])
def test_every_epoch_visits_each_window_exactly_once(windows: int) -> None:
    order = WindowOrder(windows * 8 + 5, 8, seed=3)
    for epoch in range(4):
        starts = order.starts(epoch * windows, windows)
        grid = (starts - starts.min()) % 8  # one offset for the whole epoch; windows may wrap round the stream's end
        on_grid = (starts - order.starts(epoch * windows, 1)[0]) % order.tokens
        assert len(set(starts.tolist())) == windows
        assert set(grid.tolist()) <= {0, 5, 3}, "one grid, broken at most once where the circle of 8n+5 tokens closes"
        assert len(set((on_grid // 8).tolist())) == windows


def test_windows_of_an_epoch_do_not_overlap() -> None:
    order = WindowOrder(1003, 10, seed=1)
    for epoch in range(5):
        starts = order.starts(epoch * 100, 100)
        covered = (starts[:, None] + np.arange(10)) % 1003
        assert len(np.unique(covered)) == 1000


def test_positions_of_windows_are_uniform_over_epochs_by_chi_square() -> None:
    for windows in (2, 5, 6, 16, 100):
        order, epochs = WindowOrder(windows * 4, 4, seed=7), 4000
        windows_at = _unrotated(order, epochs)  # (epochs, windows)
        counts = np.stack([np.bincount(windows_at[:, position], minlength=windows) for position in range(windows)])
        expected, freedom = epochs / windows, (windows - 1) ** 2
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom), windows


def test_neighbouring_positions_are_independent_by_chi_square() -> None:
    windows, epochs = 6, 20_000
    windows_at = _unrotated(WindowOrder(windows * 4, 4, seed=11), epochs)
    pairs = np.bincount(windows_at[:, 2] * windows + windows_at[:, 3], minlength=36).reshape(6, 6)[
        ~np.eye(6, dtype=bool)
    ]
    chi_square = ((pairs - epochs / 30) ** 2 / (epochs / 30)).sum()
    assert abs(chi_square - 29) < 5 * np.sqrt(2 * 29)


def test_epochs_and_seeds_are_uncorrelated() -> None:
    windows = 10_000
    order = WindowOrder(windows * 16, 16, seed=5)
    first, second = order.starts(0, windows), order.starts(windows, windows)
    other = WindowOrder(windows * 16, 16, seed=6).starts(0, windows)
    for one, two in (first, second), (first, other), (first[:-1], first[1:]), (first, np.arange(windows)):
        assert abs(np.corrcoef(one, two)[0, 1]) < 5 / np.sqrt(windows)


def test_the_grid_offset_is_fresh_and_uniform_over_epochs() -> None:
    order = WindowOrder(2 * 64, 64, seed=2)
    offsets = order.starts(0, 2 * 6400)[::2] % 64
    counts = np.bincount(offsets, minlength=64)
    chi_square = ((counts - 100) ** 2 / 100).sum()
    assert abs(chi_square - 63) < 5 * np.sqrt(2 * 63)


def test_a_batch_over_the_end_of_an_epoch_is_the_end_and_the_beginning() -> None:
    order = WindowOrder(1030, 10, seed=1)
    whole = order.starts(0, 400)
    for first, count in (95, 20), (0, 350), (102, 2), (399, 1):
        assert np.array_equal(order.starts(first, count), whole[first : first + count])


def test_a_trillion_tokens_cost_no_memory_and_no_seeking() -> None:
    order = WindowOrder(10**12, 1024, seed=1337)
    order.starts(0, 512)
    tracemalloc.start()
    began = time.process_time()  # not the clock on the wall: other programs may have the core
    starts = order.starts(123_456_789_012, 512)
    seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(np.unique(starts)) == 512 and starts.min() >= 0 and starts.max() < 10**12
    assert seconds < 0.1 and peak < 1_000_000, (seconds, peak)


def test_golden_positions_never_change() -> None:
    """A change here changes every run that is resumed: only with a new field in the recipe."""
    assert WindowOrder(10**6, 1000, seed=1337).starts(998, 4).tolist() == [851135, 341135, 483015, 117015]


def test_sequential_order_is_build_nanogpts_within_a_shard_and_keeps_its_dropped_tails() -> None:
    shards, B, T = [np.arange(0, 10_050), np.arange(10_050, 20_007)], 4, 16

    def build_nanogpt_windows(shard: np.ndarray) -> list[np.ndarray]:
        """Its loader: B*T+1 tokens at a time; the next shard as soon as a whole batch no longer fits."""
        rows, position = [], 0
        while position + B * T + 1 <= len(shard):
            rows += list(shard[position : position + B * T].reshape(B, T))
            position += B * T
        return rows

    theirs = [int(row[0]) for shard in shards for row in build_nanogpt_windows(shard)]
    ours = WindowOrder(20_007, T, seed=0, shuffle=False).starts(0, 20_007 // T).tolist()
    first_shard = len(build_nanogpt_windows(shards[0]))
    assert ours[:first_shard] == theirs[:first_shard]
    # They drop what is left of each shard: up to a batch of tokens. Here the windows go on over the shard's end.
    assert len(theirs) == 1248 and len(ours) == 20_007 // T == 1250
    assert ours == list(range(0, 1250 * T, T))


def test_sequential_epochs_are_all_the_same() -> None:
    order = WindowOrder(1009, 10, seed=1, shuffle=False)
    assert np.array_equal(order.starts(0, 100), order.starts(100, 100))


def test_a_stream_shorter_than_a_window_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"seq_len 1,024 .* 1,024 tokens"):
        WindowOrder(1024, 1024, seed=1)


def _unrotated(order: WindowOrder, epochs: int) -> np.ndarray:
    """The window numbers of each epoch, (epochs, windows), whatever the epoch's grid offset."""
    n = order.windows_per_epoch
    starts = order.starts(0, epochs * n).reshape(epochs, n)
    offset = starts.min(axis=1, keepdims=True) % order.seq_len  # of a stream that seq_len divides
    return ((starts - offset) % order.tokens) // order.seq_len
