"""What the README, docs/loading.md and docs/models.md say is so: their blocks run, their tables are true."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import s3fs
from support import ROOT

from jobs.bench.__main__ import BENCHES
from jobs.store import Store
from lake.schema import EPISODES, FRAMES
from train.accounting import Sample, step_flops
from train.batch import ARRAYS, Sizes, empty
from train.models.config import CONFIGS, Pi05Config
from train.packing import Budgets

README = (ROOT / "README.md").read_text()
LOADING = (ROOT / "docs/loading.md").read_text()
MODELS = (ROOT / "docs/models.md").read_text()
PACKAGES = ("lake", "ingest", "train", "serve", "jobs")


def blocks(text: str) -> list[tuple[str, str]]:
    """Return the language and the text of every block that is run, in order."""
    return re.findall(r"^```(sh|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, f"{path} has no docstring"
    return docstring.splitlines()[0].replace("|", "\\|")


def test_every_file_is_listed_with_its_first_line() -> None:
    files = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    expected = [f"| `{path.relative_to(ROOT)}` | {first_line(path)} |" for path in files]
    listed = [line for line in README.splitlines() if re.match(r"\| `(lake|ingest|train|serve|jobs)/", line)]
    assert listed == expected


def test_columns_that_it_names_are_there() -> None:
    named = re.findall(r"`(\w+)` has `([\w, ]+)`", README.replace("\n", " "))
    schemas = {"episodes": EPISODES, "frames": FRAMES}
    assert {table for table, _ in named} == schemas.keys()
    for table, columns in named:
        assert set(columns.split(", ")) <= set(schemas[table].names)


def test_flags_that_it_names_are_those_of_ingest() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "jobs.ingest", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    offered = set(re.findall(r"--[a-z][a-z-]+", shown)) - {"--help"}
    rows = "".join(line for line in README.splitlines() if line.startswith("| `--"))
    named = set(re.findall(r"--[a-z][a-z-]+", rows))
    assert named == {flag for flag in offered if not flag.startswith("--no-")}


def test_documents_that_they_point_to_are_there() -> None:
    for folder, text in ((ROOT, README), (ROOT / "docs", LOADING), (ROOT / "docs", MODELS)):
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (folder / target).exists(), target


def test_the_table_of_a_batch_is_true() -> None:
    sides = {"T": 11, "I": 12, "B": 13, "S": 14, "P": 20, "D": 16, "A": 17, "H": 18, "3": 3, "B + 2": 15}
    budgets = Budgets(tokens=sides["T"], images=sides["I"], samples=sides["B"])
    made = empty(
        Sizes(
            budgets=budgets,
            image_size=sides["S"],
            times=sides["P"],
            state_dim=sides["D"],
            action_dim=sides["A"],
            horizon=sides["H"],
        )
    )
    rows = re.findall(r"^\| `(\w+)` \| ([\w ,+]+) \| (\w+) \|", LOADING, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(ARRAYS)
    for name, shape, dtype in rows:
        array = made.arrays()[name]
        assert array.shape == tuple(sides[side] for side in shape.split(", ")), name
        assert array.dtype.name == dtype, name


def test_operations_of_samples_are_as_listed() -> None:
    rows = re.findall(r"^\| (pi-0.5|GR00T), (.*) \| ([\d.]+) \|$", MODELS, re.MULTILINE)
    assert len(rows) == 6
    for model, what, tflop in rows:
        config = CONFIGS["pi05" if model == "pi-0.5" else "groot_n15"]
        if isinstance(config, Pi05Config):
            config = replace(config, horizon=int(re.findall(r"(\d+) actions", what)[0]))
        frozen = [part for part in ("vision", "language") if "frozen" in what and part in what]
        tokens = int((re.findall(r"(\d+) tokens", what) or ["564"])[0])
        sample = Sample(tokens=tokens, images=["one", "two", "three"].index(what.split()[0]) + 1)
        assert step_flops(config, [sample], frozen=frozen) / 1e12 == pytest.approx(float(tflop), abs=0.005)


def test_errors_that_it_lists_are_there() -> None:
    modules = ("lake.errors", "train.packing", "train.turns", "train.statistics", "train.normalise")
    there = {name for module in modules for name in vars(importlib.import_module(module))} | {"ValueError"}
    named = re.findall(r"^\| `(\w+Error)", LOADING, re.MULTILINE)
    assert len(named) > 10
    assert set(named) <= there


def test_benches_are_listed() -> None:
    performance = (ROOT / "docs/performance.md").read_text()
    assert all(f"jobs.bench {name}" in performance for name in BENCHES)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_block_runs_in_a_fresh_folder(store: Store, tmp_path: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in tracked.stdout.decode().splitlines():
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["PYTHONPATH"] = str(tmp_path)
    demo = run("python -m jobs.demo", tmp_path, environment)
    assert "contact sheet: " in demo
    assert (tmp_path / "out/demo/contact_sheet.png").stat().st_size > 50_000
    files = s3fs.S3FileSystem(use_listings_cache=False)
    files.put(str(tmp_path / "out/demo/metaworld"), f"{store.bucket}/sources/metaworld", recursive=True)
    for language, block in blocks(README) + blocks(LOADING) + blocks(MODELS):
        if language == "python":
            (tmp_path / "block.py").write_text(block)
            run("python block.py", tmp_path, environment)
            continue
        on_s3 = store.environment() if "s3://" in block else {}
        for line in block.splitlines():
            run(line, tmp_path, environment | on_s3)


def run(command: str, folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout
