"""A profile of a few training steps."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch


@contextlib.contextmanager
def profiler(path: Path, *, enabled: bool) -> Iterator[torch.profiler.profile | None]:
    """Profile steps 3 to 7 if enabled: a table in profile.txt, a trace for a browser in trace.json."""
    if not enabled:
        yield None
        return

    def write(profile: torch.profiler.profile) -> None:
        table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=30)
        (path / "profile.txt").write_text(table)
        profile.export_chrome_trace(str(path / "trace.json"))

    schedule = torch.profiler.schedule(wait=1, warmup=1, active=5, repeat=1)
    # Without acc_events torch 2.11 warns about events lost between cycles; here is only one cycle.
    with torch.profiler.profile(
        schedule=schedule, on_trace_ready=write, profile_memory=True, acc_events=True
    ) as profile:
        yield profile
