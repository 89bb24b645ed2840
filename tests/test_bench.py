"""Every benchmark runs on a dataset that is given, keeps its rows, and ends in one line of JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import G1, ROOT, last_json, run_module

from jobs.bench.__main__ import BENCHES, PACKAGES
from jobs.bench.datasets import make_source, repeat_source
from jobs.bench.memory import peak_memory

TINY = {
    "decode": ["--source", G1 / "videos", "--max-files", 1, "--num-frames", 20, "--repeats", 1],
    "discover": ["--episodes", 3000, "--new", 100, "--batch", 1000],
    "ingest": ["--source", G1, "--frames", 300, "--bare-frames", 120, "--small", 2],
    "loader": ["--source", G1, "--seconds", 1, "--repeats", 1, "--no-peer", "--horizon", 8],
    "model": [
        "--tokens",
        1024,
        "--packs",
        1,
        "--repeats",
        1,
        "--compiled",
        "off",
        "--precisions",
        "none",
        "emulate",
        "te",
    ],
    "order": ["--episodes", 300, "--frames", 90_000, "--lanes", 4, "--windows", 8, "--repeats", 1],
    "packing": ["--episodes", 60, "--windows", 2],
    "scan": ["--source", G1, "--frames", 32, "--batch", 16, "--block", 16, "--repeats", 1],
}
RATIOS = {
    "discover": ["episodes_per_s"],
    "ingest": ["ratio"],
    "loader": ["of_decoder", "of_decoder_s3"],
    "model": ["packed_over_padded", "all_over_published", "emulate_over_none", "samples_per_s"],
    "order": ["planning_samples_per_s", "start_peak_above_imports_mib"],
    "packing": ["fill_tokens", "fill_images"],
    "scan": ["ratio", "ratio_s3", "ratio_block"],
}


def test_each_has_a_test() -> None:
    assert TINY.keys() == BENCHES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_bench(name: str) -> None:
    done = run_module("jobs.bench", name, *TINY[name], AWS_ENDPOINT_URL="")
    assert done.returncode == 0, done.stderr[-3000:]
    report = last_json(done.stdout)
    assert {"what", "config", "hardware", "versions", "commit", "numbers"} <= report.keys()
    assert set(report["versions"]) <= {"python", *PACKAGES}
    assert all(report["numbers"][ratio] > 0 for ratio in RATIOS.get(name, []))
    kept = json.loads((ROOT / report["rows"]).read_text())
    assert kept["rows"]
    assert kept["numbers"] == report["numbers"]


def test_the_model_runs_where_there_is_little_else_than_torch() -> None:
    absent = ("ray", "lance", "pyarrow", "obstore", "tyro", "torchao", "av", "cv2", "simplejpeg", "fsspec")
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        "from jobs.bench.__main__ import main\n"
        "sys.argv = ['jobs.bench', 'model', '--tokens', '1024', '--packs', '1', '--repeats', '1', '--no-eager',\n"
        "            '--compiled', 'off', '--precisions', 'none', 'torchao', '--model', 'groot_n15_tiny']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = last_json(done.stdout)
    assert report["numbers"]["packed_over_padded"] > 0
    rows = json.loads((ROOT / report["rows"]).read_text())["rows"]
    assert [row.get("left_out", "")[:30] for row in rows][-1], "torchao is not there"
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2


def test_a_model_or_device_that_is_not_there_is_one_clear_line() -> None:
    done = run_module("jobs.bench", "model", "--model", "pi0")
    assert done.returncode == 1
    assert done.stderr.startswith("ValueError: no model is called 'pi0'; there are pi05, groot_n15, pi05_tiny")
    done = run_module("jobs.bench", "model", "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert done.stderr.startswith("ValueError: there is no CUDA device")


def test_an_unknown_name_lists_the_known_ones() -> None:
    done = run_module("jobs.bench", "speed")
    assert done.returncode == 2
    assert all(name in done.stdout for name in BENCHES)


def test_a_wrong_dataset_is_one_clear_line(tmp_path: Path) -> None:
    done = run_module("jobs.bench", "decode", "--source", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("ValueError: no video in")


def test_a_repeated_dataset_repeats_the_good_episodes(tmp_path: Path) -> None:
    repeated = repeat_source(G1, tmp_path / "repeated", 8)
    records = [json.loads(line) for line in (repeated / "meta/episodes.jsonl").read_text().splitlines()]
    assert [record["episode_index"] for record in records] == list(range(8))
    videos = sorted((repeated / "videos").rglob("*.mp4"))
    assert len(videos) == 8
    assert videos[0].resolve() == videos[6].resolve(), "six are good, the seventh is the first again"


def test_only_a_local_v2_dataset_can_be_repeated(tmp_path: Path) -> None:
    made = make_source(tmp_path / "made", episodes=1, num_frames=4, codec="h264")
    for path in (made / "videos").rglob("*.mp4"):
        path.unlink()
    with pytest.raises(ValueError, match="no episode with all its videos"):
        repeat_source(made, tmp_path / "out", 2)


def test_peak_memory_sees_children() -> None:
    program = "b = bytearray(150 << 20); b[::4096] = b'x' * len(b[::4096]); import time; time.sleep(1.5)"
    with peak_memory() as peaks:
        subprocess.run(["python3", "-c", program], check=True)
    assert peaks.largest_mib > 150
    assert peaks.mib["python3"] > 150
