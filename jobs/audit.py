"""Audit a run: whether each of its checkpoints saw exactly the samples that it ought to have seen."""

import sys
from dataclasses import dataclass
from typing import Any

from jobs.command import main_of
from lake import Lake
from lake.errors import AuditError
from lake.storage import open_storage
from train.provenance import FILE, Checkpoint, Verdict, audit


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Recompute, from each checkpoint's cursors and the release's metadata, the sum of all samples before it.

    The sum of a run is right whatever ranks, restarts and resizes it went through; a sample lost, repeated or exchanged
    changes it. The exit code is 1 where one is wrong.
    """

    run: str
    """Folder of a run, a path or s3://; every loader.json under it is audited."""
    lake: str | None = None
    """URI of the lake, where it is no longer at the one that the checkpoints name."""


def run(config: Config) -> dict[str, Any]:
    """Return what was found of each checkpoint; print it on the way.

    Raises:
        ValueError: no checkpoint in the folder, or one that cannot be read.
        AuditError: a checkpoint saw other samples than it ought to have seen.
        CursorMismatchError: the release, or the arithmetic of the order, is not that of the run.
    """
    storage = open_storage(config.run)
    paths = sorted(path for path, _ in storage.files("") if path.rpartition("/")[2] == FILE)
    if not paths:
        raise ValueError(f"no {FILE} under {config.run}; give the folder of a run that has written checkpoints")
    lake = None if config.lake is None else Lake(config.lake)
    found: list[tuple[str, Verdict]] = []
    print(f"{'step':>8}  {'samples':>12}  {'left out':>8}  verdict", file=sys.stderr)
    for path in paths:
        data = storage.read(path)
        if data is None:
            continue  # Retention removed it meanwhile.
        verdict = audit(Checkpoint.from_json(data.decode()), lake)
        found.append((path, verdict))
        said = "right" if verdict.is_right else f"WRONG: {verdict.found}, expected {verdict.expected}"
        print(f"{verdict.step:>8}  {verdict.found.count:>12,}  {verdict.num_left_out:>8}  {said}", file=sys.stderr)
    if not found:
        raise ValueError(f"every {FILE} under {config.run} was removed while it was to be read; audit again")
    wrong = [path for path, verdict in found if not verdict.is_right]
    if wrong:
        raise AuditError(
            f"{len(wrong)} of {len(found)} checkpoints saw other samples than they ought to have seen, the first in "
            f"{wrong[0]}: samples were lost, repeated or exchanged before it"
        )
    return {
        "run": config.run,
        "checkpoints": len(found),
        "mismatches": len(wrong),
        "samples": max(verdict.found.count for _, verdict in found),
        "left_out": max(verdict.num_left_out for _, verdict in found),
    }


main = main_of(Config, run)

if __name__ == "__main__":
    main()
