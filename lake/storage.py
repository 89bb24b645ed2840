"""The object store under a lake: small files, conditional puts, Lance's options."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, from_url

from lake.errors import StoreError, StoreFullError, StoreUnreachableError, StoreUnsafeError

SCHEMES = ("", "file", "s3")


@dataclass(frozen=True, slots=True)
class Storage:
    """The storage of one lake; pickles as its URI, credentials stay in the environment."""

    uri: str

    @property
    def is_local(self) -> bool:
        """Whether the lake is on a file system."""
        return "://" not in self.uri

    def table_uri(self, table: str) -> str:
        """Return the URI of a Lance table."""
        return f"{self.uri}/{table}.lance"

    def lance_options(self) -> dict[str, str] | None:
        """Return Lance's storage options; they never hold credentials.

        Lance reads those from the standard AWS environment by itself.
        """
        if self.is_local:
            return None
        options = {"aws_region": _region()}
        endpoint = _endpoint()
        if endpoint:
            options |= {
                "aws_endpoint": endpoint,
                "allow_http": str(endpoint.startswith("http://")).lower(),
                "aws_virtual_hosted_style_request": "false",
            }
        return options

    def read(self, path: str) -> bytes | None:
        """Return a file's bytes, or None where there is no such file."""
        with _errors(self.uri):
            try:
                return bytes(obstore.get(self._store(), path).bytes()) if self._has_root() else None
            except FileNotFoundError:
                return None

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Write a file unless it is there.

        Returns:
            Whether this call wrote it. After a lost reply the client's own retry
            may find the file that it wrote: then this is False, too.
        """
        with _errors(self.uri):
            try:
                obstore.put(self._store(mkdir=True), path, data, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def files(self, prefix: str) -> Iterator[tuple[str, float]]:
        """Yield (path, time of last change in seconds) of the files under a folder."""
        with _errors(self.uri):
            for page in obstore.list(self._store(), prefix) if self._has_root() else ():
                for item in page:
                    yield item["path"], item["last_modified"].timestamp()

    def delete(self, paths: list[str]) -> None:
        """Delete files; absent ones are no error."""
        with _errors(self.uri):
            if paths and self._has_root():
                obstore.delete(self._store(), paths)

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        with _errors(self.uri):
            try:
                return self._has_root() and bool(obstore.head(self._store(), path))
            except FileNotFoundError:
                return False

    def probe(self) -> None:
        """Refuse a store that does not honour conditional puts.

        Raises:
            StoreUnsafeError: a second create of the same file went through.
            StoreUnreachableError: the store does not answer or lets nobody in.
        """
        path = f"_probe/{uuid4().hex}"
        try:
            first = self.put_if_absent(path, b"first") or self.read(path) == b"first"
            second = self.put_if_absent(path, b"second")
        except NotImplementedError as error:
            raise StoreUnsafeError(f"{self.uri}: this storage has no conditional put: {error}") from error
        finally:
            self._delete_quietly(path)
        if not first or second:
            raise StoreUnsafeError(
                f"{self.uri}: this store ignores conditional puts (If-None-Match), so concurrent commits would be "
                "lost without an error. Use one that honours them: AWS S3, MinIO, SeaweedFS, Ceph, R2, GCS."
            )

    def _delete_quietly(self, path: str) -> None:
        try:
            self.delete([path])
        except (StoreError, NotImplementedError):
            return  # The probe's own error says more.

    def _has_root(self) -> bool:
        """Whether a folder on the file system is there; reading never makes one."""
        return not self.is_local or Path(self.uri).exists()

    def _store(self, *, mkdir: bool = False) -> Any:
        if self.is_local:
            return LocalStore(self.uri, mkdir=mkdir)
        return _client(self.uri, tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))))


def open_storage(uri: str) -> Storage:
    """Return the storage at a path, ``file://`` or ``s3://`` URI.

    Raises:
        ValueError: the URI's scheme is not supported.
    """
    scheme = urlsplit(uri).scheme if "://" in uri else ""
    if scheme not in SCHEMES:
        raise ValueError(f"a lake lives at a path, file:// or s3://, not {scheme}:// ({uri})")
    if scheme == "s3":
        if not urlsplit(uri).netloc:
            raise ValueError(f"no bucket in {uri!r}; write s3://BUCKET/PATH")
        return Storage(uri.rstrip("/"))
    path = urlsplit(uri).path if scheme == "file" else uri
    if not path:
        raise ValueError("the lake's URI is empty")
    return Storage(str(Path(path).expanduser().resolve()))


@lru_cache(maxsize=16)
def _client(uri: str, _environment: tuple[tuple[str, str], ...]) -> Any:
    """Return an S3 client, one for each environment: it keeps its connections, and a new one costs a handshake."""
    endpoint = _endpoint() or ""
    return from_url(
        uri,
        client_options={"allow_http": endpoint.startswith("http://"), "timeout": timedelta(seconds=60)},
        retry_config={"max_retries": 5, "retry_timeout": timedelta(seconds=60)},
        region=_region(),
    )


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


@contextmanager
def _errors(uri: str) -> Iterator[None]:
    """Turn the client's errors into ours."""
    try:
        yield
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise StoreUnreachableError(f"{uri}: access denied; check the AWS_* environment. {_brief(error)}") from error
    except BaseError as error:
        raise store_error(uri, error) from error
    except OSError as error:
        raise store_error(uri, error) from error


def store_error(uri: str, error: Exception) -> StoreError:
    """Return our error for one that a storage client raised."""
    text = str(error)
    if "os error 28" in text or "No space left" in text:
        return StoreFullError(f"{uri}: no space left on the storage. Free some and run the job again: {_brief(error)}")
    return StoreUnreachableError(f"{uri}: the storage does not answer as it should: {_brief(error)}")


def _brief(error: Exception) -> str:
    """Return an error's first line; clients append pages of debug output."""
    return str(error).strip().split("\n", 1)[0][:400]
