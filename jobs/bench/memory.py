"""Peak memory of the processes of a benchmark, seen from outside."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PERIOD_S = 0.25


class Peaks:
    """The largest resident memory that any process had, by what it is."""

    def __init__(self) -> None:
        self.mib: dict[str, float] = {}

    def look(self, root: int) -> None:
        """Take note of a process and all its descendants."""
        for pid in _family(root):
            found = _memory(pid)
            if found:
                name, mib = found
                self.mib[name] = max(self.mib.get(name, 0.0), mib)

    @property
    def largest_mib(self) -> float:
        """Of any process."""
        return max(self.mib.values(), default=0.0)


@contextmanager
def peak_memory() -> Iterator[Peaks]:
    """Watch this process and its descendants while the block runs."""
    peaks, stop = Peaks(), threading.Event()

    def watch() -> None:
        while not stop.wait(_PERIOD_S):
            peaks.look(os.getpid())

    thread = threading.Thread(target=watch, name="peak-memory", daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        stop.set()
        thread.join()


def _family(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    family, todo = [], [root]
    while todo:
        pid = todo.pop()
        family.append(pid)
        todo += children.get(pid, [])
    return family


def _memory(pid: int) -> tuple[str, float] | None:
    """Return (name, MiB) of a process: what is its own, less the object store that all map."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        command = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").replace("\0", " ").strip()
    except OSError:
        return None
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    if "RssAnon" not in fields:
        return None
    kib = sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssFile"))
    name = command if command.startswith("ray::") else Path(command.split(" ", 1)[0] or fields["Name"]).name
    return ("driver" if pid == os.getpid() else name), kib / 1024
