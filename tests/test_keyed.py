"""Tests of train/keyed.py."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT

from train.keyed import key_of, mix, permute

RELAXED = settings(deadline=None)
WORD = st.integers(0, 2**64 - 1)


@RELAXED
@given(key=WORD, size=st.integers(1, 3000))
def test_a_permutation_takes_every_index_to_another_one(key: int, size: int) -> None:
    taken = permute(key, size, np.arange(size, dtype=np.uint64))
    assert np.array_equal(np.sort(taken), np.arange(size))


@RELAXED
@given(keys=st.lists(WORD, min_size=1, max_size=20), size=st.integers(1, 10**15), data=st.data())
def test_elementwise_is_the_same_as_one_by_one(keys: list[int], size: int, data: st.DataObject) -> None:
    sizes = [data.draw(st.integers(1, size)) for _ in keys]
    index = [data.draw(st.integers(0, each - 1)) for each in sizes]
    together = permute(np.array(keys, np.uint64), np.array(sizes, np.uint64), np.array(index, np.uint64))
    one_by_one = [int(permute(k, s, np.array([i], np.uint64))[0]) for k, s, i in zip(keys, sizes, index, strict=True)]
    assert together.tolist() == one_by_one
    assert all(0 <= value < each for value, each in zip(one_by_one, sizes, strict=True))


@pytest.mark.parametrize(("size", "index"), [(0, 0), (5, 5), (1, 2**63)])
def test_an_index_outside_is_refused(size: int, index: int) -> None:
    with pytest.raises(ValueError, match="cannot take index"):
        permute(1, size, np.array([index], np.uint64))


def test_a_permutation_is_about_as_good_as_a_shuffle() -> None:
    size = 9973
    for key in range(20):
        taken = permute(key, size, np.arange(size, dtype=np.uint64)).astype(np.float64)
        # Of a true shuffle each of these correlations has a standard deviation of about 0.01.
        assert abs(np.corrcoef(taken, np.arange(size))[0, 1]) < 0.05
        assert abs(np.corrcoef(taken[1:], taken[:-1])[0, 1]) < 0.05
    first = permute(np.arange(30_000, dtype=np.uint64), 10, np.full(1, 3, np.uint64)).astype(np.int64)
    assert np.abs(np.bincount(first, minlength=10) - 3000).max() < 300


def test_pairs_of_neighbours_land_anywhere() -> None:
    size = 16
    seen = np.zeros((size, size), np.int64)
    for key in range(6000):
        taken = permute(key, size, np.arange(2, dtype=np.uint64)).astype(np.int64)
        seen[taken[0], taken[1]] += 1
    off = seen[~np.eye(size, dtype=bool)]
    assert np.trace(seen) == 0
    assert off.min() > 5, "25 are expected of each pair"
    assert off.max() < 60


def test_hashes_look_random_and_keys_are_no_shifts_of_each_other() -> None:
    counters = np.arange(20_000, dtype=np.uint64)
    words = {key: mix(key, counters) for key in (0, 1, 2, 2**63)}
    for word in words.values():
        assert len(np.unique(word)) == len(counters)
        bits = np.unpackbits(word.view(np.uint8)).reshape(-1, 64).mean(axis=0)
        assert np.abs(bits - 0.5).max() < 0.02
    assert not set(words[0].tolist()) & set(words[1].tolist())


def test_a_key_names_its_parts() -> None:
    keys = [key_of(1, "a"), key_of("a", 1), key_of("1", "a"), key_of(1, "a", 0), key_of(1, "b"), key_of(11, "a")]
    assert len(set(keys)) == len(keys)
    assert key_of(1, "a") == keys[0]


def test_another_process_has_the_same_numbers() -> None:
    code = (
        "import numpy as np\nfrom train.keyed import *\n"
        "print(key_of(7, 'x'), permute(key_of(7), 1000, np.arange(5, dtype=np.uint64)).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    here = permute(key_of(7), 1000, np.arange(5, dtype=np.uint64)).tolist()
    assert done.stdout.strip() == f"{key_of(7, 'x')} {here}"
    # Of this very release: numbers that change make every cursor ever saved wrong without a word.
    assert done.stdout.strip() == "18260226501148772036 [36, 890, 334, 878, 725]"
