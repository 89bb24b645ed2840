"""Tests of train/samples.py: every number of a pack is compared with what plain reading of the release gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training import make_released, small

from lake import Release
from lake.errors import BadSampleError, LakeDamagedError
from train.augment import Augmentation
from train.batch import Batch
from train.geometry import fit_into
from train.loader import LoaderConfig, open_parts
from train.normalise import RepresentationMismatchError
from train.samples import Assembler, SampleConfig
from train.segments import IMAGE_ID
from train.statistics import Statistics
from train.tokens import state_bins


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return make_released(tmp_path_factory.mktemp("samples"))


def packs_of(release: Release, config: LoaderConfig, windows: int = 3) -> tuple[Assembler, list[Batch]]:
    assembler, reader = open_parts(release, config)
    found = []
    for number in range(windows):
        window = assembler.read(number, reader)
        # Copied, for the memory of images is used again.
        for index in range(len(window.packs)):
            batch = assembler.pack(window, index)
            found.append(Batch(**{**vars(batch), "images_ISSC": batch.images_ISSC.copy()}))
    return assembler, found


def rows_of(
    release: Release, assembler: Assembler, batch: Batch, at: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the episode of a sample, and its frames, read the plain way."""
    source = assembler.plan.sources[batch.source_B[at]]
    episode = assembler.plan.first_episode[batch.source_B[at]] + batch.episode_B[at]
    uid = assembler.plan.episodes.uid[episode].decode()
    (found,) = release.episodes(f"episode_uid = '{uid}'").to_pylist()
    assert found["source"] == source
    return found, release.frames(episodes=[uid]).to_pylist()


def scaled(values: list[float], stats: Any) -> np.ndarray:
    x = np.asarray(values)
    return (x - stats.q01) / (stats.q99 - stats.q01 + 1e-6) * 2 - 1


def test_a_pack_holds_what_the_release_holds(release: Release) -> None:
    config = small(sample={"past_frames": (3,), "past_s": (0.5,), "past_views": True}, packs={"tokens": 4096})
    assembler, batches = packs_of(release, config)
    statistics = Statistics.of_release(release)
    seen = set()
    for batch in batches:
        starts = iter(range(batch.num_images))
        for b in range(batch.num_samples):
            episode, frames = rows_of(release, assembler, batch, b)
            t, source = int(batch.frame_B[b]), episode["source"]
            seen.add((source, len(episode["views"])))
            ago = [5, 3, 0]  # Half a second is five frames.
            state = statistics.get(source, episode["embodiment"], "state")
            for p, each in enumerate(ago):
                expected = scaled(frames[max(0, t - each)]["state"], state)
                assert np.allclose(batch.state_BPD[b, p, :3], expected, atol=1e-4)
                assert batch.state_valid_BP[b, p] == (t - each >= 0)
            assert not batch.state_BPD[b, :, 3:].any()
            action = statistics.get(source, episode["embodiment"], "action")
            for h in range(4):
                row = frames[min(t + h, len(frames) - 1)]
                assert np.allclose(batch.action_BHA[b, h, :2], scaled(row["action"], action), atol=1e-4)
                assert batch.action_valid_BH[b, h] == (t + h < len(frames))
            assert not batch.action_BHA[b, :, 2:].any()
            assert (batch.state_dim_B[b], batch.action_dim_B[b], batch.weight_B[b]) == (3, 2, 1)
            assert assembler.plan.embodiments[batch.embodiment_B[b]] == episode["embodiment"]
            begin, end = batch.cu_seqlens[b], batch.cu_seqlens[b + 1]
            assert (batch.segment_ids_T[begin:end] == b).all()
            assert batch.positions_T[begin:end].tolist() == list(range(end - begin))
            ids = batch.token_ids_T[begin:end]
            views = len(episode["views"]) * 3
            bins = " ".join(map(str, state_bins(batch.state_BPD[b, -1, :3]).tolist()))
            text = f"<bos>Task: {episode['tasks'][frames[t]['task_index']]}, State: {bins};\nAction: "
            assert ids[ids != IMAGE_ID].tolist() == assembler.plan.tokenizer.encode(text)
            assert (ids == IMAGE_ID).sum() == 256 * views
            for each in ago:
                for jpeg in frames[max(0, t - each)]["views"]:
                    at = next(starts)
                    slot = np.empty((32, 32, 3), np.uint8)
                    fit_into(jpeg, slot, "pad")
                    assert np.array_equal(batch.images_ISSC[at], slot)
                    assert batch.image_samples_I[at] == b
                    first = batch.image_starts_I[at]
                    assert (batch.token_ids_T[first : first + 256] == IMAGE_ID).all()
                    assert begin <= first < end
        assert next(starts, None) is None
    assert seen == {("toy", 2), ("other", 1)}, "two sources, with as many views as they have"


def test_what_is_not_used_holds_nothing(release: Release) -> None:
    assembler, batches = packs_of(release, small())
    budgets = assembler.sizes.budgets
    for batch in batches:
        n, used = batch.num_samples, batch.num_tokens
        assert batch.cu_seqlens[n] == used
        assert (batch.cu_seqlens[n + 1 :] == budgets.tokens).all()
        assert (batch.segment_ids_T[used:] == budgets.samples).all()
        assert not batch.token_ids_T[used:].any()
        assert (batch.image_starts_I[batch.num_images :] == budgets.tokens).all()
        assert (batch.image_samples_I[batch.num_images :] == budgets.samples).all()
        assert not batch.images_ISSC[batch.num_images :].any()
        assert not batch.weight_B[n:].any()
        assert not batch.action_valid_BH[n:].any()
        assert (batch.source_B[n:] == -1).all()
        assert batch.images_ISSC.shape == (budgets.images, 32, 32, 3)
        assert batch.cu_seqlens.shape == (budgets.samples + 2,)


def test_views_are_chosen_by_name(release: Release) -> None:
    assembler, batches = packs_of(release, small(packs={"views": ("wrist", "top")}))
    checked = 0
    for batch in batches:
        at = 0
        for b in range(batch.num_samples):
            episode, frames = rows_of(release, assembler, batch, b)
            views = dict(zip(episode["views"], frames[int(batch.frame_B[b])]["views"], strict=True))
            for name in ("wrist", "top"):
                if name in views:
                    slot = np.empty((32, 32, 3), np.uint8)
                    fit_into(views[name], slot, "pad")
                    assert np.array_equal(batch.images_ISSC[at], slot)
                    at += 1
                    checked += name == "wrist"
        assert at == batch.num_images
    assert checked


def test_a_view_that_no_episode_has_is_refused(release: Release) -> None:
    with pytest.raises(ValueError, match=r"no episode has any of the views left; there are top, wrist"):
        open_parts(release, small(packs={"views": ("left",)}))


def test_randomness_is_of_the_sample_and_never_of_the_place(release: Release) -> None:
    def keys(config: LoaderConfig) -> dict[tuple[int, ...], tuple[int, bytes]]:
        found = {}
        for batch in packs_of(release, config, windows=6)[1]:
            image = 0
            for b in range(batch.num_samples):
                ids = tuple(int(each[b]) for each in (batch.source_B, batch.epoch_B, batch.episode_B, batch.frame_B))
                found[ids] = (int(batch.key_B[b]), batch.images_ISSC[image].tobytes())
                image += int((batch.image_samples_I == b).sum())
        return found

    augment = Augmentation()
    first = keys(small(augment=augment))
    other_packs = keys(small(augment=augment, packs={"tokens": 1500}, order={"window_blocks": 7, "lanes": 1}))
    shared = first.keys() & other_packs.keys()
    assert len(shared) > 20
    assert all(first[ids] == other_packs[ids] for ids in shared)
    assert len({key for key, _ in first.values()}) == len(first), "each sample has a key of its own"
    other_seed = keys(small(augment=augment, order={"seed": 1}))
    plain = keys(small())
    for others in (other_seed, plain):
        both = first.keys() & others.keys()
        assert both
        assert all(first[ids][1] != others[ids][1] for ids in both)


def test_relative_actions_need_statistics_of_such(release: Release) -> None:
    config = small(sample={"relative_dims": {"toy": (0, 1), "arm": (1,)}})
    with pytest.raises(RepresentationMismatchError, match="of_relative_actions"):
        open_parts(release, config)
    statistics = Statistics.of_relative_actions(release, relative_dims={"toy": (0, 1), "arm": (1,)}, horizon=4)
    with pytest.raises(RepresentationMismatchError):
        open_parts(release, small(), statistics)
    assembler, reader = open_parts(release, config, statistics)
    window = assembler.read(0, reader)
    for index in range(len(window.packs)):
        batch = assembler.pack(window, index)
        for b in range(batch.num_samples):
            episode, frames = rows_of(release, assembler, batch, b)
            t, relative = int(batch.frame_B[b]), {"toy": [1, 1], "arm": [0, 1]}[episode["embodiment"]]
            stats = statistics.get(episode["source"], episode["embodiment"], "action")
            for h in range(4):
                row = np.array(frames[min(t + h, len(frames) - 1)]["action"])
                row = row - np.array(relative) * frames[t]["state"][:2]
                assert np.allclose(batch.action_BHA[b, h, :2], scaled(row.tolist(), stats), atol=1e-4)


@pytest.mark.parametrize("scheme", ["mean_std", "min_max", "none"])
def test_other_schemes_of_normalisation(release: Release, scheme: str) -> None:
    assembler, batches = packs_of(release, small(sample={"normalise": scheme}), windows=1)
    statistics = Statistics.of_release(release)
    episode, frames = rows_of(release, assembler, batches[0], 0)
    stats = statistics.get(episode["source"], episode["embodiment"], "state")
    raw = np.array(frames[int(batches[0].frame_B[0])]["state"])
    expected = {
        "mean_std": (raw - stats.mean) / (stats.std + 1e-6),
        "min_max": (raw - stats.min) / (stats.max - stats.min) * 2 - 1,
        "none": raw,
    }[scheme]
    assert np.allclose(batches[0].state_BPD[0, 0, :3], expected, atol=1e-4)


def test_a_state_wider_than_the_model_is_refused(release: Release) -> None:
    with pytest.raises(ValueError, match=r"has a state of 3 dimensions, more than state_dim=2; raise it"):
        open_parts(release, small(sample={"state_dim": 2}))


def test_a_relative_dimension_that_is_not_there_is_refused(release: Release) -> None:
    config = small(sample={"relative_dims": {"toy": (2,)}, "normalise": "none"})
    with pytest.raises(
        ValueError, match=r"dimension 2 of toy is to be relative.*3 dimensions and an action of 2; leave"
    ):
        open_parts(release, config)


def test_a_past_in_the_future_is_refused() -> None:
    with pytest.raises(ValueError, match="count backwards"):
        SampleConfig(past_frames=(0,))
    with pytest.raises(ValueError, match="count backwards"):
        SampleConfig(past_s=(-0.1,))


def damaged(release: Release, config: LoaderConfig, jpeg: bytes) -> tuple[Assembler, Any]:
    """Return a window of which one picture is replaced."""
    assembler, reader = open_parts(release, config)
    blocks = reader.read(assembler.block_keys(0))
    block = blocks[0]
    old = block.jpegs[: block.jpeg_ends[1]]
    new = (jpeg + bytes(len(old)))[: len(old)]
    blocks[0] = type(block)(**{**vars(block), "jpegs": memoryview(new + bytes(block.jpegs[len(old) :]))})
    return assembler, assembler.window(0, blocks)


def test_a_picture_that_cannot_be_decoded_is_named(release: Release) -> None:
    assembler, window = damaged(release, small(), b"\xff\xd8\xff no picture")
    with pytest.raises(
        BadSampleError, match=r"frame \d+ of episode \w{32} of source \w+: view top at frame \d+ cannot"
    ):
        [assembler.pack(window, index) for index in range(len(window.packs))]


def test_a_sample_whose_picture_cannot_be_decoded_may_be_left_out(release: Release) -> None:
    assembler, window = damaged(release, small(sample={"on_bad_picture": "leave_out"}), b"no picture")
    batches = [assembler.pack(window, index) for index in range(len(window.packs))]
    bad = [batch for batch in batches if batch.left_out]
    assert [len(batch.left_out) for batch in bad] == [1]
    rows = np.flatnonzero(bad[0].weight_B[: bad[0].num_samples] == 0)
    assert len(rows) == 1
    assert f"frame {bad[0].frame_B[rows[0]]} of episode" in bad[0].left_out[0]


def test_rows_that_are_gone_are_an_error(tmp_path: Path) -> None:
    release = make_released(tmp_path)
    for path in (tmp_path / "lake/frames.lance/data").iterdir():
        path.unlink()
    assembler, reader = open_parts(release, small())
    with pytest.raises(LakeDamagedError, match="frames cannot be read"):
        reader.read(assembler.block_keys(0))
