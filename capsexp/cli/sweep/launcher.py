"""The launcher of sweeps. Each job is a process, so that a crash ends only that job."""

import contextlib
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.live import Live

from capsexp.child import python_command
from capsexp.cli.sweep.directories import directories, job_config
from capsexp.cli.sweep.folder import Sweep, job_labels, jobs_table
from capsexp.cli.sweep.job_process import JOB_VARIABLE
from capsexp.config.compose import to_plain
from capsexp.config.typed_paths import quoted
from capsexp.errors import JobFailed, RunStopped
from capsexp.files import make_folder, open_own
from capsexp.terminal import new_console
from capsexp.text import printable
from capsexp.training.run_dir import RunDir
from capsexp.training.stop_signal import StopSignal

POLL_SECONDS = 0.1
MAX_TABLE_ROWS = 30  # the live table must fit the terminal
SWEEP_SETTINGS = (  # Hydra's settings of the sweep, which its jobs do not get
    *("hydra.sweep", "hydra.launcher", "hydra/launcher", "hydra.sweeper", "hydra/sweeper"),
    *("hydra.mode", "hydra.run", "hydra.output_subdir"),
)
PrintLine = Callable[[str], None]


class JobProcess:
    """One run of a sweep, and the process that works on it."""

    def __init__(self, label: str, overrides: Sequence[str], run: RunDir) -> None:
        self.label, self.overrides, self.run = label, list(overrides), run
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._stop_sent = False

    @property
    def log(self) -> Path:
        """The file that gets the output of the process."""
        return self.run.path / "stdout.log"

    @property
    def state(self) -> str:
        """The status in status.json; `failed` if the process fails after it has completed the run."""
        exited_well = self._process is None or self._process.returncode == 0
        state = str(self.run.status().get("status"))
        return "failed" if state == "completed" and not exited_well else state

    def start(self, arguments: Sequence[str], environment: dict[str, str]) -> None:
        """Start `capsexp train` with these arguments."""
        make_folder(self.run.path)
        with open_own(self.log, "ab") as log:
            self._log_start = log.tell()
            # In its own session, so that Ctrl-C reaches it only once, through us. The pipe to its stdin
            # closes when this process exits.
            self._process = subprocess.Popen(
                [*python_command("from capsexp.cli import main; sys.exit(main())"), "train", *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment, JOB_VARIABLE: "1"},
                start_new_session=True,
            )

    def has_ended(self) -> bool:
        """Return whether the process has ended. If it did not record its end, record it."""
        assert self._process is not None
        if self._process.poll() is None:
            return False
        assert self._process.stdin is not None
        self._process.stdin.close()
        status = self.run.status()
        recorded = status.get("pid") == self._process.pid and status.get("status") != "running"
        if not recorded and not self.run.is_locked():  # a lock belongs to another process, not to this job
            self._record_end()
        return True

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, if it is still running."""
        if self._process is not None and self._process.poll() is None:
            self._stop_sent = True
            self._process.send_signal(number)

    def outcome(self) -> str:
        """Return in one line how the process ended."""
        if self.state == "completed":
            return f"{self.label}: finished"
        error = self.run.status().get("error") or self._exit_reason()
        return f"{self.label}: {self.state}: {str(error).splitlines()[0]}; see {self.log}"

    def _record_end(self) -> None:
        assert self._process is not None
        code = self._process.returncode
        stopped = self._stop_sent and (code < 0 or code > 128)  # by our signal, before it trained
        with contextlib.suppress(OSError):  # the disk may be full, or the directory removed
            self.run.mark_dead("interrupted" if stopped else "failed", self._exit_reason(), exit_code=code)
            if not stopped:
                from capsexp.training.events import end_session

                end_session(self.run.path, "failed")

    def _exit_reason(self) -> str:
        """Return the signal that killed the process, or its exit code and last line of output."""
        assert self._process is not None
        code, lines = self._process.returncode, []
        if code < 0:
            killed = f"killed by {signal.Signals(-code).name}"
            return f"{killed} (out of memory?)" if -code == signal.SIGKILL else killed
        with contextlib.suppress(OSError), open(self.log, "rb") as log:
            log.seek(self._log_start)
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
        last = next((line for line in reversed(lines) if line), "no output")
        return f"exit code {code}: {last.removeprefix('capsexp: ')}"


class FailedJob(JobReturn):
    """The result of a failed job. It raises the job's error on access, without the line that Hydra logs."""

    @property
    def return_value(self) -> None:
        """Raise the job's error."""
        raise self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


def launch(
    context: HydraContext,
    master: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    *,
    first_number: int,
    n_jobs: int | None,
) -> list[JobReturn]:
    """Run every job that is not complete yet.

    Args:
        context: Hydra's, to compose the config of a job.
        master: the config of the sweep.
        job_overrides: the overrides of each job.
        first_number: number of the first of these jobs in the sweep.
        n_jobs: number of parallel jobs; None means one for each GPU, or one.

    Returns:
        A result for each job, in order; the value of a completed job is its best validation accuracy.

    Raises:
        RunStopped: Ctrl-C or SIGTERM. The jobs have saved their progress.
        UserError: jobs cannot have the directories that the user has chosen.
    """
    sweep = Sweep(Path(master.hydra.sweep.dir))
    all_overrides = [_without_hydra(overrides) for overrides in job_overrides]
    names = directories(context.config_loader, master, all_overrides, first_number)
    runs = [sweep.add(overrides, name=name) for overrides, name in zip(all_overrides, names, strict=True)]
    labels = job_labels(sweep.jobs())
    jobs = [
        JobProcess(labels[str(run.path.relative_to(sweep.path))], overrides, run)
        for overrides, run in zip(all_overrides, runs, strict=True)
    ]
    unique = {job.run.path: job for job in jobs}  # equal settings are one job
    slots = slots_for(n_jobs, device=OmegaConf.select(master, "device.name"))
    console = new_console(soft_wrap=True)
    with StopSignal() as stop, live_table(sweep, console) as print_line:
        _run_jobs(
            deque(unique.values()), slots, lambda job: _arguments(context, master, job), stop, print_line
        )
        if stop.asked():
            raise RunStopped("sweep stopped; run the same command to resume", exit_code=stop.exit_code)
    return [_result(unique[job.run.path]) for job in jobs]


def slots_for(n_jobs: int | None, *, device: str | None) -> list[dict[str, str]]:
    """Return an environment for each parallel job: it assigns a GPU, or a share of the cores."""
    gpus = [] if device == "cpu" else _gpus()
    count = n_jobs or max(1, len(gpus))
    if len(gpus) > 1:
        return [{"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} for slot in range(count)]
    if count > 1 and not gpus and "OMP_NUM_THREADS" not in os.environ:
        return [{"OMP_NUM_THREADS": str(max(1, _cores() // count))}] * count
    return [{}] * count


@contextlib.contextmanager
def live_table(sweep: Sweep, console: Console) -> Iterator[PrintLine]:
    """Show a live table of all jobs below the printed lines, if the console is a terminal.

    Yields:
        A function that prints a line, and writes sweep.json.
    """
    live = Live(
        get_renderable=lambda: jobs_table(sweep.jobs(), max_rows=MAX_TABLE_ROWS),
        console=console,
        refresh_per_second=2,
        transient=True,
    )

    def print_line(line: str) -> None:
        console.print(printable(line))
        sweep.write()

    with live if console.is_terminal else contextlib.nullcontext():
        yield print_line


def _gpus() -> list[str]:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_jobs(
    waiting: deque[JobProcess],
    slots: Sequence[dict[str, str]],
    arguments_of: Callable[[JobProcess], list[str] | None],
    stop: StopSignal,
    print_line: PrintLine,
) -> None:
    """Keep every slot busy until all jobs have ended, or until a stop signal has ended the running ones."""
    running: dict[int, JobProcess] = {}
    stopping = False
    try:
        while running or (waiting and not stop.asked()):
            free = sorted(set(range(len(slots))) - running.keys())
            if waiting and free and not stop.asked():
                job = waiting.popleft()
                if (arguments := arguments_of(job)) is None:
                    print_line(f"{job.label}: already finished")
                else:
                    job.start(arguments, slots[free[0]])
                    running[free[0]] = job
                    print_line(f"{job.label}: started")
                continue
            if stop.asked() and not stopping:
                stopping = True
                for job in running.values():
                    job.send_signal(stop.exit_code - 128)
            time.sleep(POLL_SECONDS)
            for slot, job in [*running.items()]:
                if job.has_ended():
                    del running[slot]
                    print_line(job.outcome())
    finally:  # after a second Ctrl-C or an error, jobs may still be running
        for job in running.values():
            job.send_signal(signal.SIGKILL)


def _arguments(context: HydraContext, master: DictConfig, job: JobProcess) -> list[str] | None:
    """Return the arguments of `capsexp train` for a job; None if the run is complete with this config."""
    composed = job_config(context.config_loader, master, job.overrides, 0)
    if job.run.is_finished(to_plain(composed)):
        return None
    name = ["-cn", composed.hydra.job.config_name]
    folders = [
        argument
        for source in composed.hydra.runtime.config_sources
        if source.provider == "command-line"
        for argument in ("-cd", source.path)
    ]
    as_typed = cast(list[str], OmegaConf.to_container(master.hydra.overrides.hydra, resolve=False))
    inherited = [override for override in as_typed if not override.startswith(SWEEP_SETTINGS)]
    return [*name, *folders, *inherited, *job.overrides, f"run={quoted(job.run.path)}"]


def _without_hydra(overrides: Sequence[str]) -> list[str]:
    return [override for override in overrides if not override.startswith(("hydra.", "hydra/"))]


def _result(job: JobProcess) -> JobReturn:
    completed = job.state == "completed"
    result = JobReturn() if completed else FailedJob()
    result.overrides, result.working_dir, result.task_name = job.overrides, str(job.run.path), "train"
    result.status = JobStatus.COMPLETED if completed else JobStatus.FAILED
    result._return_value = job.run.best_accuracy() if completed else JobFailed(job.outcome())
    return result
