"""What importing robolake loads, and the names that people use."""

import json
import subprocess
import sys

import pytest
from support import ROOT

import lake

HEAVY = ("ray", "torch", "tyro", "cv2", "av", "torchcodec", "decord", "s3fs", "fsspec", "transformers")


def python(code: str) -> dict:
    """Run code in a fresh interpreter; return the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_importing_the_lake_is_light() -> None:
    # Processor time, because others may use the machine; `import lance` is what every reader of Lance pays.
    seen = python(
        "import json, sys, time\n"
        "began = time.process_time()\nimport lance\nmiddle = time.process_time()\n"
        "before = set(sys.modules)\nimport lake\nlake.Lake\nend = time.process_time()\n"
        "new = sorted({name.partition('.')[0] for name in set(sys.modules) - before})\n"
        "print(json.dumps({'lance_s': middle - began, 'lake_s': end - middle, 'new': new}))\n"
    )
    assert not set(seen["new"]) & set(HEAVY)
    assert seen["lake_s"] < 1.0


@pytest.mark.parametrize("module", ["lake", "lake.commit", "lake.verify", "lake.staging"])
def test_the_lake_needs_none_of_the_heavy_packages(module: str) -> None:
    loaded = python(f"import json, sys\nimport {module}\nprint(json.dumps(sorted(sys.modules)))")
    assert module in loaded
    assert not set(HEAVY) & set(loaded)


def test_the_command_line_of_the_lake_needs_no_ray() -> None:
    loaded = python("import json, sys\nimport lake.__main__\nprint(json.dumps(sorted(sys.modules)))")
    assert "tyro" in loaded
    assert not {"ray", "torch", "av"} & set(loaded)


@pytest.mark.parametrize(
    "module",
    [
        "ingest.validate",
        "ingest.features",
        "ingest.source",
        "lake.sketch",
        "lake.checksum",
        "train.audit",
        "train.normalise",
        "train.plan",
        "train.samples",
        "train.segments",
    ],
)
def test_the_pure_core_needs_neither_ray_nor_torch(module: str) -> None:
    loaded = python(f"import json, sys\nimport {module}\nprint(json.dumps(sorted(sys.modules)))")
    assert not {"ray", "torch"} & set(loaded)


def test_the_public_names_are_these() -> None:
    assert sorted(lake.__all__) == ["Lake", "Release", "RobolakeError", "__version__"]
    assert all(hasattr(lake, name) for name in lake.__all__)
    assert [name for name in vars(lake.Lake) if not name.startswith("_")] == [
        "create",
        "uri",
        "releases",
        "release",
        "quarantine",
        "retry",
        "make_release",
        "tag",
        "verify",
        "unreleased",
        "cleanup",
    ]
    assert sorted(name for name in vars(lake.Release) if not name.startswith("_")) == [
        "dataset",
        "episodes",
        "first_rows",
        "frames",
        "open_videos",
        "scan",
        "sketches",
        "stats",
        "take_frames",
        "video",
    ]


def test_the_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert lake.__version__ == version("robolake")
