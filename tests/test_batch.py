"""Tests of train/batch.py."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from train.batch import ARRAYS, Batch, Pictures, Sizes, empty, to_torch
from train.packing import Budgets

SIZES = Sizes(
    budgets=Budgets(tokens=50, images=4, samples=3), image_size=8, times=2, state_dim=5, action_dim=6, horizon=7
)


def test_a_batch_without_samples_is_all_padding() -> None:
    batch = empty(SIZES)
    assert batch.images_ISSC.shape == (4, 8, 8, 3)
    assert batch.state_BPD.shape == (3, 2, 5)
    assert batch.state_valid_BP.shape == (3, 2)
    assert batch.action_BHA.shape == (3, 7, 6)
    assert batch.action_valid_BH.shape == (3, 7)
    assert batch.cu_seqlens.tolist() == [0, 50, 50, 50, 50], "the tail is a segment, and the only one"
    assert batch.positions_T.tolist() == list(range(50))
    assert (batch.segment_ids_T == 3).all()
    assert (batch.image_starts_I == 50).all()
    assert (batch.image_samples_I == 3).all()
    assert not batch.weight_B.any()
    assert (batch.source_B == -1).all()
    assert (batch.num_samples, batch.num_tokens, batch.num_images, batch.lane) == (0, 0, 0, None)


def test_every_array_becomes_a_tensor_of_its_type() -> None:
    batch = empty(SIZES)
    tensors = to_torch(batch)
    assert [each.name for each in fields(Batch)][: len(ARRAYS)] == list(ARRAYS)
    for name, array in batch.arrays().items():
        tensor = tensors.arrays()[name]
        assert isinstance(tensor, torch.Tensor)
        assert np.array_equal(tensor.numpy(), array)
        assert tensor.numpy().dtype == array.dtype
        assert tensor.data_ptr() == array.ctypes.data, "memory is shared"
    assert (tensors.num_samples, tensors.left_out) == (0, ())


@pytest.mark.filterwarnings("error")
def test_what_cannot_be_written_to_is_copied() -> None:
    batch = empty(SIZES)
    for array in batch.arrays().values():
        array.flags.writeable = False
    to_torch(batch).images_ISSC[0] = 7
    assert not batch.images_ISSC.any()


def test_memory_of_images_is_used_again_when_nobody_holds_it() -> None:
    pictures = Pictures(SIZES)
    first = pictures.take()
    address = first.ctypes.data
    assert pictures.take().ctypes.data != address
    del first
    assert pictures.take().ctypes.data == address


@pytest.mark.parametrize("part", ["view", "tensor", "part of a tensor", "batch"])
def test_memory_of_images_that_somebody_holds_a_part_of_is_left_alone(part: str) -> None:
    pictures = Pictures(SIZES)
    images = pictures.take()
    address = images.ctypes.data
    batch = to_torch(empty(SIZES, images))
    held = {"view": images[1:2], "tensor": batch.images_ISSC, "part of a tensor": batch.images_ISSC[2], "batch": batch}[
        part
    ]
    del images, batch
    assert pictures.take().ctypes.data != address
    del held
    assert pictures.take().ctypes.data == address
