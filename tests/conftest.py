"""What all tests share: one object store, one Ray, real data."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from support import G1

from jobs.store import Store, local_store

# Before torch is imported. Small products gain nothing from a second thread, and lose much where it waits for a core
# that others use.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--g1", default=str(G1), help="the g1_bottle dataset to test with; the cut one by default")


@pytest.fixture(scope="session")
def g1(request: pytest.FixtureRequest) -> Path:
    """A real LeRobot v2.1 dataset: 9 episodes, of which 0, 3 and 6 have no video."""
    return Path(request.config.getoption("--g1")).resolve()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A real S3 store on loopback; its credentials are in the environment."""
    with local_store(tmp_path_factory.mktemp("store")) as store:
        before = {name: os.environ.get(name) for name in store.environment()}
        os.environ.update(store.environment())
        yield store
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@pytest.fixture
def bucket(store: Store) -> str:
    """A folder of its own in the store."""
    return f"s3://{store.bucket}/{uuid4().hex[:12]}"


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder of its own: on the file system, then in the store."""
    return str(tmp_path / "lake") if request.param == "local" else request.getfixturevalue("bucket") + "/lake"


@pytest.fixture(scope="session")
def ray(store: Store) -> Iterator[object]:
    """One Ray for all tests, with a temporary folder of its own."""
    import ray as module

    # Socket paths are limited to 107 bytes.
    folder = tempfile.mkdtemp(prefix="rl-", dir="/tmp")
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.init("local", num_cpus=2, _temp_dir=folder, include_dashboard=False, log_to_driver=False)
    yield module
    module.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def lerobot() -> Path:
    """The python of an environment with LeRobot 0.4.4; made once, in .venv-lerobot."""
    from jobs.bench.peer import lerobot_python

    return lerobot_python()
