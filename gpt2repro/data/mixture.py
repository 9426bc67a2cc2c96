"""Mixtures: several datasets, each with a weight, as one order and one stream.

    order = MixtureOrder([WindowOrder(stream.tokens, 1024, seed=1337) for stream in streams], (0.7, 0.3))
    MixtureStream(streams).read(start=order.starts(first=0, count=1)[0], count=1025)

A pattern that repeats says which source each position of the order reads: with weights 0.7 and 0.3 a source stands in
it 7 and 3 times in 10. After any number of windows every source has had its share of them, less or more than one
window. The windows of one source come in the order of a run on that source alone. Position 10**9 costs what 0 does.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from gpt2repro.data.order import WindowOrder
from gpt2repro.data.stream import Shard, TokenStream

LONGEST_PATTERN = 100_000  # windows: making it takes less than a second


def shares_of(weights: Sequence[float]) -> list[Fraction]:
    """Each weight as its share of their sum, exactly as the decimals say: 0.1 is a tenth."""
    exact = [Fraction(str(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]


def make_pattern(weights: Sequence[float]) -> np.ndarray:
    """The source of every window until all sources have had whole shares: (period,) int64.

    Earliest deadline first: window j of a source may not come before share * time = j, and is due at j + 1. Such
    deadlines can always be met (Baruah et al., "Proportionate Progress", 1996), and keep every count within one.

    Raises:
        ValueError: the pattern would be longer than LONGEST_PATTERN.
    """
    shares = shares_of(weights)
    period = math.lcm(*(share.denominator for share in shares))
    if period > LONGEST_PATTERN:
        longest = f"more than {LONGEST_PATTERN:,} windows until their shares are whole"
        raise ValueError(f"dataset_weights is {[*weights]}, {longest}: give weights of fewer digits")
    quotas = [int(share * period) for share in shares]
    seen, pattern = [0] * len(quotas), np.empty(period, dtype=np.int64)
    for time in range(period):
        due = [
            (-(-(count + 1) * period // quota), source)
            for source, (count, quota) in enumerate(zip(seen, quotas, strict=True))
            if count * period < (time + 1) * quota
        ]
        pattern[time] = source = min(due)[1]
        seen[source] += 1
    return pattern


class MixtureOrder:
    """The orders of several streams as one, by weight; `starts` are positions in their MixtureStream."""

    def __init__(self, orders: Sequence[WindowOrder], weights: Sequence[float]) -> None:
        self.orders, self.seq_len = orders, orders[0].seq_len
        self.pattern = make_pattern(weights)
        sources = np.arange(len(orders))
        # The windows of each source among the first n of the pattern, n from 0 on: (period + 1, sources).
        self._counts = np.vstack([0 * sources, np.cumsum(self.pattern[:, None] == sources, axis=0)])
        self._bases = np.cumsum([0, *(order.tokens for order in orders)])

    def counts(self, position: int) -> np.ndarray:
        """The windows of each source among the first `position` of the order. (sources,) int64."""
        periods, rest = divmod(position, len(self.pattern))
        return periods * self._counts[-1] + self._counts[rest]

    def starts(self, first: int, count: int) -> np.ndarray:
        """Token offsets of the global sample positions first … first+count-1. (count,) int64."""
        sources = self.pattern[np.arange(first, first + count) % len(self.pattern)]
        before, after = self.counts(first), self.counts(first + count)
        starts = np.empty(count, dtype=np.int64)
        for source, order in enumerate(self.orders):
            own = order.starts(int(before[source]), int(after[source] - before[source]))
            starts[sources == source] = self._bases[source] + own
        return starts


class MixtureStream:
    """Several streams one after another; what is read from a position of one stays in its circle."""

    def __init__(self, streams: Sequence[TokenStream]) -> None:
        self.streams = streams
        self.tokens = sum(stream.tokens for stream in streams)
        self.dtype = np.result_type(*(stream.dtype for stream in streams))
        self._ends = np.cumsum([stream.tokens for stream in streams])

    def _own(self, position: int) -> tuple[TokenStream, int]:
        source = int(np.searchsorted(self._ends, position, side="right"))
        stream = self.streams[source]
        return stream, position - int(self._ends[source]) + stream.tokens

    def locate(self, position: int, ahead: int = 0) -> tuple[Shard, int]:
        """The shard of the token `ahead` of a position, and the place within its tokens."""
        stream, own = self._own(position)
        return stream.locate(own, ahead)

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids from `start` on; after the last token of its stream comes that stream's first."""
        stream, own = self._own(start)
        return stream.read(own, count)


Order = WindowOrder | MixtureOrder
Stream = TokenStream | MixtureStream
