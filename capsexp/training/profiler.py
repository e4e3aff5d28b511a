"""A profile of a few training steps."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch


@contextlib.contextmanager
def profiler(path: Path, wanted: bool) -> Iterator[torch.profiler.profile | None]:
    """A profile of steps 3 to 7: a table in profile.txt, a trace for a browser in trace.json."""
    if not wanted:
        yield None
        return

    def write(profile: torch.profiler.profile) -> None:
        table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=30)
        (path / "profile.txt").write_text(table)
        profile.export_chrome_trace(str(path / "trace.json"))

    schedule = torch.profiler.schedule(wait=1, warmup=1, active=5, repeat=1)
    # acc_events: without it torch 2.11 warns of events lost between cycles; there is only one.
    with torch.profiler.profile(
        schedule=schedule, on_trace_ready=write, profile_memory=True, acc_events=True
    ) as profile:
        yield profile
