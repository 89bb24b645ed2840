"""Opening, creating and appending to the Lance tables of a lake."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import lance
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from lance import LanceDataset, LanceOperation
from lance.fragment import FragmentMetadata

from lake.errors import CommitUnknownError, LakeDamagedError
from lake.schema import FRAMES, STORAGE_VERSION, TABLES
from lake.storage import Storage, store_error

T = TypeVar("T")

_RETRIES = 8
_RETRYABLE = ("conflict", "unknown", "Retryable", "too many", "error sending request", "timed out", "500")


def open_table(storage: Storage, table: str, version: int | str | None = None) -> LanceDataset:
    """Open a table at a version, a tag, or its newest state.

    Raises:
        LakeDamagedError: the table, or that version of it, is not there.
        StoreError: the storage does not answer.
    """
    uri = storage.table_uri(table)
    try:
        return lance.dataset(uri, version=version, storage_options=storage.lance_options())
    except (ValueError, OSError) as error:
        if "not found" in str(error).lower():
            raise LakeDamagedError(f"{uri}: table or version {version} is missing: {str(error)[:300]}") from error
        raise store_error(uri, error) from error


def create_table(storage: Storage, table: str) -> None:
    """Create an empty table; one that exists is left as it is.

    Raises:
        StoreError: the storage refused.
    """
    if _is_there(storage, table):
        return
    schema = TABLES.get(table, FRAMES)
    try:
        # Without retries this is a put-if-absent of the first version. With them, as in mode="create",
        # one who comes second overwrites the table, and whatever was committed to it.
        dataset = lance.LanceDataset.commit(
            storage.table_uri(table),
            LanceOperation.Overwrite(schema, []),
            storage_options=storage.lance_options(),
            enable_v2_manifest_paths=True,
            enable_stable_row_ids=True,
            max_retries=0,
        )
        assert dataset.data_storage_version == STORAGE_VERSION, dataset.data_storage_version
    except (OSError, RuntimeError) as error:
        if not _is_there(storage, table):
            raise store_error(storage.table_uri(table), error) from error


def take_rows(dataset: LanceDataset, ids: Sequence[int], columns: Sequence[str] | None) -> pa.Table:
    """Return rows by stable id, in the order given.

    Raises:
        LakeDamagedError: some are gone.
        ValueError: an unknown column.
    """
    check_columns(dataset, columns)
    if not ids:
        names = columns if columns is not None else dataset.schema.names
        return pa.schema([dataset.schema.field(name) for name in names]).empty_table()
    table = dataset._take_rows(list(ids), columns=list(columns) if columns is not None else None)  # noqa: SLF001
    if table.num_rows != len(ids):
        raise LakeDamagedError(f"{dataset.uri}: {len(ids) - table.num_rows} of {len(ids)} rows are gone")
    return table


def check_columns(dataset: LanceDataset, columns: Sequence[str] | None) -> None:
    """Refuse columns that a table has not; Lance panics at some.

    Raises:
        ValueError: an unknown column.
    """
    unknown = set(columns or ()) - set(dataset.schema.names)
    if unknown:
        raise ValueError(f"unknown columns {sorted(unknown)}; there are {', '.join(dataset.schema.names)}")


def append_fragments(
    storage: Storage, table: str, fragments: list[FragmentMetadata], base_version: int, properties: dict[str, str]
) -> dict[str, int]:
    """Append fragments unless they are there, and say where their rows begin.

    Lance's Append is not idempotent, so the table itself is asked first, and again
    after an outcome that is not known. Two committers may still both append the
    same fragments: the copies have row ids of their own and the index of episodes
    names one of them.

    Args:
        base_version: a version that is older than any commit of these fragments.

    Returns:
        First stable row id by the path of a fragment's data file. A fragment that was
        compacted, then cleaned away with its history, is left out: nobody can tell
        where its rows are, and appending it again would make the table unreadable.
    """
    first_rows: dict[str, int] = {}
    gone: set[str] = set()
    for attempt in range(_RETRIES):
        dataset = open_table(storage, table)
        found, history_is_whole = _find(dataset, {_path(f) for f in fragments} - first_rows.keys(), base_version)
        first_rows |= found
        if not history_is_whole:
            gone = {_path(f) for f in fragments if not storage.exists(data_path(table, _path(f)))}
        missing = [f for f in fragments if _path(f) not in first_rows.keys() | gone]
        if not missing:
            return first_rows
        transaction = lance.Transaction(
            read_version=dataset.version,
            operation=LanceOperation.Append(missing),
            transaction_properties=properties,
        )
        try:
            lance.LanceDataset.commit(dataset, transaction, storage_options=storage.lance_options())
        except (OSError, RuntimeError) as error:
            _wait_or_raise(storage.table_uri(table), error, attempt)
    raise CommitUnknownError(f"{storage.table_uri(table)}: the append could not be confirmed in {_RETRIES} tries")


def merge_new(storage: Storage, table: str, rows: pa.Table) -> int:
    """Insert the rows whose primary key is new.

    This is the compare-and-swap of the protocol: of two concurrent merges of one
    key, one inserts and the other finds it there. Repeating it changes nothing. Of
    several rows of one key the first counts; Lance would insert them all.

    Returns:
        How many rows this call inserted, as far as known: a repeat after a lost
        reply counts none.
    """
    key = rows.schema.names[0]
    rows = _first_of_each_key(rows)

    def merge() -> int:
        dataset = open_table(storage, table)
        outcome = dataset.merge_insert(key).when_not_matched_insert_all().execute(rows)
        return int(outcome["num_inserted_rows"])

    return retried(storage.table_uri(table), merge)


def delete_rows(storage: Storage, table: str, where: str) -> None:
    """Delete rows by an SQL condition."""
    retried(storage.table_uri(table), lambda: open_table(storage, table).delete(where))


def retried(uri: str, action: Callable[[], T]) -> T:
    """Run an idempotent action again after conflicts, lost replies and passing faults."""
    for attempt in range(_RETRIES):
        try:
            return action()
        except (OSError, RuntimeError) as error:
            _wait_or_raise(uri, error, attempt)
    raise CommitUnknownError(f"{uri}: no outcome could be confirmed in {_RETRIES} tries")


def data_path(table: str, file: str) -> str:
    """Return where in a lake's storage a table's data file lies."""
    return f"{table}.lance/data/{file}"


def uid_array(column: pa.ChunkedArray) -> npt.NDArray[np.bytes_]:
    """Return a column of 32-character ids as fixed-width bytes: a third of the memory of strings, and sortable."""
    parts = [np.array(chunk.to_pylist(), "S32") for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.zeros(0, "S32")


def quoted(values: Iterable[str]) -> str:
    """Return values as the inside of an SQL ``IN (...)``."""
    return ", ".join("'" + value.replace("'", "''") + "'" for value in values)


def _is_there(storage: Storage, table: str) -> bool:
    try:
        open_table(storage, table)
    except LakeDamagedError:
        return False
    return True


def _first_of_each_key(rows: pa.Table) -> pa.Table:
    keys = rows.column(0).to_pylist()
    first = {key: keys.index(key) for key in keys} if len(set(keys)) < len(keys) else {}
    return rows.take(sorted(first.values())) if first else rows


def _find(dataset: LanceDataset, paths: set[str], base_version: int) -> tuple[dict[str, int], bool]:
    """Return the first row ids of those data files that were ever committed, and whether that is sure."""
    found = _fragments_by_path(dataset, paths)
    is_whole = True
    for version in range(base_version + 1, dataset.version + 1):
        if found.keys() >= paths:
            break
        transaction = _transaction(dataset, version)
        if not isinstance(transaction, lance.Transaction):
            is_whole = False
            continue
        operation = transaction.operation
        if isinstance(operation, LanceOperation.Append) and {_path(f) for f in operation.fragments} & paths:
            # Compaction has rewritten them since; stable row ids are the same as then.
            found |= _fragments_by_path(dataset.checkout_version(version), paths - found.keys())
    return found, is_whole


def _transaction(dataset: LanceDataset, version: int) -> Any:
    try:
        return dataset.read_transaction(version)
    except (OSError, ValueError):
        return None  # Cleaned away. Appending what is still there is harmless: nothing names the other copy.


def _fragments_by_path(dataset: LanceDataset, paths: set[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    if not paths:
        return found
    for fragment in reversed(dataset.get_fragments()):
        path = _path(fragment.metadata)
        if path in paths and path not in found:
            batch = fragment.scanner(columns=[], with_row_id=True, limit=1).to_table()
            found[path] = batch.column("_rowid")[0].as_py()
            if len(found) == len(paths):
                break
    return found


def _path(fragment: FragmentMetadata) -> str:
    return fragment.files[0].path


def _wait_or_raise(uri: str, error: Exception, attempt: int) -> None:
    if not any(word.lower() in str(error).lower() for word in _RETRYABLE) or attempt == _RETRIES - 1:
        raise store_error(uri, error) from error
    time.sleep(min(5.0, 0.05 * 2**attempt))
