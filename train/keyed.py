"""Randomness that is arithmetic: keyed hashes and keyed permutations of any size.

Nothing here has state. Whoever asks for the random number of (seed, epoch, episode, frame) gets the same one, on
whatever rank, after whatever restart, in whatever order.
"""

import hashlib
import json

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

STEP = np.uint64(0x9E3779B97F4A7C15)
FIRST, SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
"""Of the hash, for ``train.models.inputs`` too, which computes it on tensors."""
_ROUNDS = np.arange(6, dtype=np.uint64)


def key_of(*parts: str | int) -> int:
    """Return a key of 64 bits that names its parts: other parts, or the same in another order, give another key."""
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest(), "little")


def mix(key: int | Words, counter: Words) -> Words:
    """Return a hash of 64 bits of each counter under a key, or under a key each.

    Source: the output function of SplitMix64 (Steele, Lea and Flood, 2014), once for the counter, and once more with
    the key in it, since a sum of key and counter alone would make neighbouring keys shifted copies of each other.
    """
    return _finish(_finish(counter * STEP + STEP) ^ np.asarray(key, np.uint64))


def permute(key: int | Words, size: int | Words, index: Words) -> Words:
    """Return where a keyed permutation of 0 ... size - 1 takes each index; arguments may be arrays, elementwise.

    It is a Feistel network over two digits of base about sqrt(size), added modulo their base, so the network permutes
    hardly more than ``size`` numbers; those that fall outside go round again.

    Source: Black and Rogaway, Ciphers with arbitrary finite domains, 2002.

    Raises:
        ValueError: a size below 1, or an index outside.
    """
    sizes, keys = np.asarray(size, np.uint64), np.asarray(key, np.uint64)
    index = np.asarray(index, np.uint64)
    if (sizes < 1).any() or (index >= sizes).any():
        raise ValueError(f"a permutation of {size} cannot take index {index.max(initial=0)}")
    shape = np.broadcast(keys, sizes, index).shape
    keys, sizes, index = (np.broadcast_to(each, shape).reshape(-1) for each in (keys, sizes, index))
    round_keys = mix(keys, _ROUNDS[:, None])
    low = np.ceil(np.sqrt(sizes)).astype(np.uint64)
    high = (sizes + low - np.uint64(1)) // low
    value = _network(round_keys, low, high, index)
    todo = np.flatnonzero(value >= sizes)
    while len(todo):
        value[todo] = _network(round_keys[:, todo], low[todo], high[todo], value[todo])
        todo = todo[value[todo] >= sizes[todo]]
    return value.reshape(shape)


def _network(round_keys: Words, low: Words, high: Words, value: Words) -> Words:
    left, right = value % low, value // low
    for number, keys in enumerate(round_keys):
        # Keys of rounds are hashes, so no two are near enough for the sums to repeat one another.
        if number % 2 == 0:
            left = (left + _finish(right * STEP + keys) % low) % low
        else:
            right = (right + _finish(left * STEP + keys) % high) % high
    return left + low * right


def _finish(word: Words) -> Words:
    """Finish a word in place: callers pass what is theirs alone."""
    word ^= word >> np.uint64(30)
    word *= FIRST
    word ^= word >> np.uint64(27)
    word *= SECOND
    word ^= word >> np.uint64(31)
    return word
