"""A profile of a few training steps."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from capsexp.files import write_atomic


@contextlib.contextmanager
def profiler(path: Path, *, enabled: bool) -> Iterator[torch.profiler.profile | None]:
    """Profile steps 3 to 7 if enabled: a table in profile.txt, a trace for a browser in trace.json."""
    if not enabled:
        yield None
        return

    def write(profile: torch.profiler.profile) -> None:
        table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=30)
        write_atomic(path / "profile.txt", lambda file: file.write(table.encode()))
        with tempfile.TemporaryDirectory() as folder:  # the profiler follows links, and hides a full disk
            trace = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(trace))
            write_atomic(path / trace.name, lambda file: file.write(trace.read_bytes()))

    schedule = torch.profiler.schedule(wait=1, warmup=1, active=5, repeat=1)
    # Without acc_events torch 2.11 warns about events lost between cycles; here is only one cycle.
    with torch.profiler.profile(
        schedule=schedule, on_trace_ready=write, profile_memory=True, acc_events=True
    ) as profile:
        yield profile
