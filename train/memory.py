"""Memory of this process."""

from pathlib import Path


def own_memory_mib(field: str) -> float:
    """Return a field of this process's status, as VmHWM, its peak; ``getrusage`` may give its parent's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def forget_peak() -> None:
    """Let VmHWM begin anew at what the process holds now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
