"""The order of training: global sample position -> token offset in the stream. Pure functions of (seed, position).

Every epoch visits each window of the stream exactly once, in a fresh pseudo-random permutation and on a window grid
with a fresh offset. Nothing is stored and nothing is skipped over: position 10**9 costs what position 0 does, at any
size of the dataset. The permutation is a Feistel network on just enough bits, walked until it lands inside the range
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

    order = WindowOrder(stream.tokens, 1024, seed=1337)
    order.starts(first=step * sequences_per_step, count=sequences_per_step)   # int64 token offsets
"""

import numpy as np

ROUNDS = 10  # even: the rounds alternate between the halves


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every input bit moves every output bit. uint64 in, uint64 out, wrapping."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash(key: np.ndarray, salt: int) -> np.ndarray:
    return _mix(key + np.uint64((salt + 1) * 0x9E3779B97F4A7C15 & (2**64 - 1)))


def permute(index: np.ndarray, key: np.ndarray, n: int) -> np.ndarray:
    """Where the permutation of 0 … n-1 that `key` names sends each index. uint64 arrays of one shape."""
    bits = max((n - 1).bit_length(), 8)  # on fewer bits a Feistel network is measurably not uniform
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64(2 ** (bits // 2) - 1)
    high_mask = np.uint64(2 ** (bits - bits // 2) - 1)
    round_keys = [_hash(key, i) for i in range(ROUNDS)]
    out = index.copy()
    todo = np.arange(len(index))  # walking on from a value outside 0 … n-1 keeps the map one to one
    while len(todo):
        low, high = out[todo] & low_mask, out[todo] >> low_bits
        for i in range(0, ROUNDS, 2):
            high ^= _mix(low ^ round_keys[i][todo]) & high_mask
            low ^= _mix(high ^ round_keys[i + 1][todo]) & low_mask
        out[todo] = (high << low_bits) | low
        todo = todo[out[todo] >= n]
    return out


class WindowOrder:
    """The windows of a circular stream of `tokens` tokens, `seq_len` tokens each, in the order of training.

    With shuffle=False every epoch is the grid from offset 0, in stream order.
    """

    def __init__(self, tokens: int, seq_len: int, *, seed: int, shuffle: bool = True) -> None:
        if seq_len < 1 or tokens <= seq_len:
            advice = "a window takes seq_len + 1 tokens; shorten seq_len or prepare more text"
            raise ValueError(f"seq_len {seq_len:,} does not fit a stream of {tokens:,} tokens: {advice}")
        self.tokens, self.seq_len, self.seed, self.shuffle = tokens, seq_len, seed, shuffle
        self.windows_per_epoch = tokens // seq_len

    def starts(self, first: int, count: int) -> np.ndarray:
        """Token offsets of the global sample positions first … first+count-1, over epoch ends. (count,) int64."""
        position = np.arange(first, first + count, dtype=np.int64)
        epoch, window = np.divmod(position, self.windows_per_epoch)
        if not self.shuffle:
            return window * self.seq_len
        key = _hash(_hash(np.uint64(self.seed % 2**64) + np.zeros(count, np.uint64), 0) ^ epoch.astype(np.uint64), 1)
        window = permute(window.astype(np.uint64), key, self.windows_per_epoch).astype(np.int64)
        offset = (_hash(key, ROUNDS) % np.uint64(self.seq_len)).astype(np.int64)
        return (window * self.seq_len + offset) % self.tokens
