"""The files of a source: a folder on any file system that fsspec reaches."""

import io
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import fsspec

from lake.errors import EpisodeError, SourceMetadataError, SourceNotFoundError

LFS_MARK = b"version https://git-lfs"
MAX_META_BYTES = 1 << 30
"""A single metadata file larger than this is refused."""

MAX_LINE_BYTES = 64 << 20
"""A single line of a metadata file longer than this is refused."""

_S3_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class SourceFiles:
    """A source's root; pickles as its URI."""

    uri: str

    @property
    def is_local(self) -> bool:
        """Whether paths can be opened by libraries that know files only."""
        return urlsplit(self.uri).scheme in ("", "file")

    @property
    def name(self) -> str:
        """Last part of the URI."""
        return posixpath.basename(self.uri.rstrip("/")) or "source"

    def path(self, relative: str) -> str:
        """Return the file system's path of a file of the source.

        Raises:
            SourceMetadataError: the path leads out of the source.
        """
        clean = posixpath.normpath(relative)
        if clean.startswith(("/", "..")) or "\0" in relative or "\\" in relative or "://" in relative:
            raise SourceMetadataError(f"{self.uri}: the path {relative!r} leads out of the source")
        return _root(self.uri) if clean == "." else posixpath.join(_root(self.uri), clean)

    def open(self, relative: str) -> BinaryIO:
        """Open a file for seeking and reading.

        Raises:
            FileNotFoundError: there is none.
        """
        fs = _file_system(self.uri)
        if self.is_local:
            return fs.open(self.path(relative), "rb")
        return fs.open(self.path(relative), "rb", block_size=_S3_BLOCK_BYTES, cache_type="readahead")

    def read_meta(self, relative: str) -> bytes:
        """Return a metadata file's bytes.

        Raises:
            SourceMetadataError: it is missing, empty, too large or an LFS pointer.
            SourceNotFoundError: the store does not answer.
        """
        with self._errors():
            try:
                with self.open(relative) as file:
                    data = file.read(MAX_META_BYTES + 1)
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
                raise SourceMetadataError(f"{self.uri}: {relative} is missing") from error
        if not data.strip():
            raise SourceMetadataError(f"{self.uri}: {relative} is empty")
        if len(data) > MAX_META_BYTES:
            raise SourceMetadataError(f"{self.uri}: {relative} is larger than {MAX_META_BYTES >> 20} MiB")
        if data.startswith(LFS_MARK):
            raise SourceMetadataError(f"{self.uri}: {relative} is a Git LFS pointer; run `git lfs pull` in the source")
        return data

    def meta_lines(self, relative: str) -> Iterator[bytes]:
        """Yield the lines of a metadata file, streaming.

        Raises:
            SourceMetadataError: it is missing, an LFS pointer, or has a line of no end.
        """
        with self._errors():
            try:
                file = self.open(relative)
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
                raise SourceMetadataError(f"{self.uri}: {relative} is missing") from error
            with io.BufferedReader(file) as buffered:  # type: ignore[arg-type]
                while line := buffered.readline(MAX_LINE_BYTES):
                    if line.startswith(LFS_MARK):
                        message = f"{self.uri}: {relative} is a Git LFS pointer; run `git lfs pull` in the source"
                        raise SourceMetadataError(message)
                    if len(line) == MAX_LINE_BYTES:
                        raise SourceMetadataError(f"{self.uri}: {relative} has a line over {MAX_LINE_BYTES >> 20} MiB")
                    yield line

    def exists(self, relative: str) -> bool:
        """Whether there is such a file or folder."""
        with self._errors():
            return bool(_file_system(self.uri).exists(self.path(relative)))

    def find(self, relative: str) -> list[str]:
        """Return the files below a folder, sorted, relative to the root; none where there is no folder."""
        with self._errors():
            fs, root = _file_system(self.uri), _root(self.uri)
            try:
                found = fs.find(self.path(relative))
            except FileNotFoundError:
                return []
            return sorted(posixpath.relpath(fs._strip_protocol(path), root) for path in found)  # noqa: SLF001

    def states(self, folder: str) -> dict[str, str]:
        """Return size and etag of each file in a folder, by path relative to the root.

        A file system without etags gives the time of the last change in its place.
        """
        with self._errors():
            fs, root = _file_system(self.uri), _root(self.uri)
            fs.invalidate_cache(self.path(folder))
            try:
                listing = fs.ls(self.path(folder), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
            files = [info for info in listing if info["type"] == "file"]
            return {posixpath.relpath(info["name"], root): _state(info) for info in files}

    def check_episode_file(self, relative: str, kind: str) -> None:
        """Raise unless a file of an episode is there, has bytes and is no LFS pointer.

        Args:
            kind: ``video`` or ``data``, the first word of the reason.

        Raises:
            EpisodeError: KIND-missing, KIND-empty or lfs-pointer.
            SourceNotFoundError: the store does not answer.
        """
        try:
            with self._errors(), self.open(relative) as file:
                head = file.read(len(LFS_MARK))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise EpisodeError(f"{kind}-missing", f"{relative} is not there") from error
        if not head:
            raise EpisodeError(f"{kind}-empty", f"{relative} has no bytes")
        if head == LFS_MARK:
            message = f"{relative} is a Git LFS pointer; run `git lfs pull` in the source"
            raise EpisodeError("lfs-pointer", message)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise
        except _store_errors() as error:
            text = str(error).split("\n", 1)[0][:300]
            raise SourceNotFoundError(
                f"{self.uri}: the source's store does not let us in or does not answer; check the URI, the endpoint "
                f"and the AWS_* environment ({type(error).__name__}: {text})"
            ) from error


def open_files(uri: str) -> SourceFiles:
    """Return the files below a path or any fsspec URI.

    Raises:
        SourceNotFoundError: nothing there, or the store does not answer.
    """
    scheme = urlsplit(uri).scheme
    if not uri:
        raise SourceNotFoundError("the source's URI is empty")
    if scheme and scheme not in fsspec.available_protocols():
        raise SourceNotFoundError(f"{uri}: no file system for {scheme}://; fsspec knows none of this name")
    files = SourceFiles(uri.rstrip("/") or "/")
    try:
        is_there = files.exists(".")
    except ImportError as error:
        raise SourceNotFoundError(f"{uri}: the file system for {scheme}:// is not installed: {error}") from error
    if not is_there:
        raise SourceNotFoundError(f"{uri}: nothing is there")
    return files


def _state(info: dict[str, Any]) -> str:
    etag = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified")
    return f"{info.get('size')}:{etag}"


@lru_cache(maxsize=8)
def _file_system(uri: str) -> Any:
    return fsspec.url_to_fs(uri, **_options(uri))[0]


@lru_cache(maxsize=8)
def _root(uri: str) -> str:
    return str(fsspec.url_to_fs(uri, **_options(uri))[1]).rstrip("/")


def _options(uri: str) -> dict[str, Any]:
    # Listings change under us when a dataset grows.
    return {"use_listings_cache": False} if urlsplit(uri).scheme not in ("", "file") else {}


def _store_errors() -> tuple[type[Exception], ...]:
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return (OSError,)
    return (OSError, BotoCoreError, ClientError)
