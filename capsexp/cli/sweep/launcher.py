"""The launcher of sweeps: each job is a process, so that whatever ends one ends it alone."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.live import Live

from capsexp.cli.sweep.folder import Sweep, names, table
from capsexp.cli.sweep.job_process import WATCHED
from capsexp.config.compose import to_plain
from capsexp.config.overrides import quoted
from capsexp.errors import JobFailed, RunStopped
from capsexp.training.run_dir import RunDir
from capsexp.training.stop_signal import StopSignal

POLL_SECONDS = 0.1
SHOWN_JOBS = 30  # in the table on a terminal, which has to fit
OF_THE_SWEEP = (  # what is said to Hydra about the sweep, and not about its jobs
    *("hydra.sweep", "hydra.launcher", "hydra/launcher", "hydra.sweeper", "hydra/sweeper"),
    *("hydra.mode", "hydra.run", "hydra.output_subdir"),
)
Say = Callable[[str], None]


class Job:
    """One run of a sweep, and the process that is at work on it."""

    def __init__(self, name: str, overrides: Sequence[str], run: RunDir) -> None:
        self.name, self.overrides, self.run = name, list(overrides), run
        self._process: subprocess.Popen[bytes] | None = None
        self._log_begin = 0
        self._asked_to_stop = False

    @property
    def log(self) -> Path:
        """What its process prints."""
        return self.run.path / "stdout.log"

    @property
    def state(self) -> str:
        """As status.json has it; a process that says complete and then fails has failed."""
        ended_well = self._process is None or self._process.returncode == 0
        state = str(self.run.status().get("status"))
        return "failed" if state == "completed" and not ended_well else state

    def begin(self, words: Sequence[str], environment: dict[str, str]) -> None:
        """Start a process with the words after `capsexp train`."""
        self.run.path.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            self._log_begin = log.tell()
            # In a session of its own: Ctrl-C reaches it once, through us. Its standard input ends when we do.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "capsexp", "train", *words],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment, WATCHED: "1"},
                start_new_session=True,
            )

    def has_ended(self) -> bool:
        """Whether the process has ended; what it could not say itself is then said for it."""
        assert self._process is not None
        if self._process.poll() is None:
            return False
        assert self._process.stdin is not None
        self._process.stdin.close()
        status = self.run.status()
        spoke = status.get("pid") == self._process.pid and status.get("status") != "running"
        if not spoke and not self.run.is_locked():  # by a process that is none of ours
            self._speak_for_the_dead()
        return True

    def _speak_for_the_dead(self) -> None:
        assert self._process is not None
        code = self._process.returncode
        stopped = self._asked_to_stop and code < 0  # before it could listen
        self.run.mark_dead("interrupted" if stopped else "failed", self._last_words(), exit_code=code)
        if not stopped:
            from capsexp.training.record import end_session

            end_session(self.run.path, "failed")

    def signal(self, number: int) -> None:
        """Pass a signal on."""
        if self._process is not None and self._process.poll() is None:
            self._asked_to_stop = True
            self._process.send_signal(number)

    def ending(self) -> str:
        """How the process ended, in one line."""
        if self.state == "completed":
            return f"{self.name}: finished"
        error = self.run.status().get("error") or self._last_words()
        return f"{self.name}: {self.state}: {str(error).splitlines()[0]}; see {self.log}"

    def _last_words(self) -> str:
        assert self._process is not None
        code = self._process.returncode
        if code < 0:
            killed = f"killed by {signal.Signals(-code).name}"
            return f"{killed}; was the memory used up?" if -code == signal.SIGKILL else killed
        with open(self.log, "rb") as log:
            log.seek(self._log_begin)
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
        last = next((line for line in reversed(lines) if line), "it said nothing")
        return f"exit code {code}: {last.removeprefix('capsexp: ')}"


class FailedJob(JobReturn):
    """What Hydra gets for a failed job: an error as soon as it asks for the result, without Hydra's line."""

    @property
    def return_value(self) -> None:
        """Raises the job's error."""
        raise self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


def launch(
    context: HydraContext, master: DictConfig, job_overrides: Sequence[Sequence[str]], *, n_jobs: int | None
) -> list[JobReturn]:
    """Run every job that is not complete yet.

    Args:
        context: Hydra's, to compose the config of a job.
        master: the config of the sweep.
        job_overrides: those of each job.
        n_jobs: jobs at a time; None is one for each GPU, or one.

    Returns:
        What each job came to, in order; of a completed one its best validation accuracy.

    Raises:
        RunStopped: Ctrl-C or SIGTERM; the jobs have saved what they had.
    """
    sweep = Sweep(Path(master.hydra.sweep.dir))
    overrides = [_of_the_job(words) for words in job_overrides]
    runs = [sweep.ask(words) for words in overrides]
    called = names(sweep.jobs())
    asked = [Job(called[run.path.name], words, run) for words, run in zip(overrides, runs, strict=True)]
    jobs = {job.run.path: job for job in asked}  # the same settings twice are one job
    slots = slots_for(n_jobs, device=OmegaConf.select(master, "device.name"))
    with StopSignal() as stop, _telling(sweep) as say:
        _work_through(deque(jobs.values()), slots, lambda job: _command(context, master, job), stop, say)
        if stop.asked():
            raise RunStopped("the sweep was stopped; the same command goes on", exit_code=stop.exit_code)
    return [_returned(jobs[job.run.path]) for job in asked]


def slots_for(n_jobs: int | None, *, device: str | None) -> list[dict[str, str]]:
    """The environment of each job that may run at a time: a GPU of its own, or its share of the cores."""
    gpus = [] if device == "cpu" else _gpus()
    count = n_jobs or max(1, len(gpus))
    if len(gpus) > 1:
        return [{"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} for slot in range(count)]
    if count > 1 and not gpus and "OMP_NUM_THREADS" not in os.environ:
        return [{"OMP_NUM_THREADS": str(max(1, _cores() // count))}] * count
    return [{}] * count


def _gpus() -> list[str]:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _work_through(
    waiting: deque[Job],
    slots: Sequence[dict[str, str]],
    command_of: Callable[[Job], list[str] | None],
    stop: StopSignal,
    say: Say,
) -> None:
    """Keep every slot busy until all jobs have ended, or no more are wanted."""
    running: dict[int, Job] = {}
    passed_on = False
    try:
        while running or (waiting and not stop.asked()):
            free = sorted(set(range(len(slots))) - running.keys())
            if waiting and free and not stop.asked():
                job = waiting.popleft()
                if (words := command_of(job)) is None:
                    say(f"{job.name}: finished before")
                else:
                    job.begin(words, slots[free[0]])
                    running[free[0]] = job
                    say(f"{job.name}: started")
                continue
            if stop.asked() and not passed_on:
                passed_on = True
                for job in running.values():
                    job.signal(stop.exit_code - 128)
            time.sleep(POLL_SECONDS)
            for slot, job in [*running.items()]:
                if job.has_ended():
                    del running[slot]
                    say(job.ending())
    finally:  # of a second Ctrl-C, or a mistake of ours
        for job in running.values():
            job.signal(signal.SIGKILL)


def _command(context: HydraContext, master: DictConfig, job: Job) -> list[str] | None:
    """The words after `capsexp train`; None if the run is complete under this very config."""
    hydras = [str(text) for text in master.hydra.overrides.hydra]
    composed = context.config_loader.load_sweep_config(master, job.overrides)
    with open_dict(composed):
        composed.hydra.job.id, composed.hydra.job.num = "0", 0
    HydraConfig.instance().set_config(composed)
    if job.run.is_finished(to_plain(composed)):
        return None
    sources = composed.hydra.runtime.config_sources
    folders = [word for one in sources if one.provider == "command-line" for word in ("-cd", one.path)]
    kept = [text for text in hydras if not text.startswith(OF_THE_SWEEP)]
    name = ["-cn", composed.hydra.job.config_name]
    return [*name, *folders, *kept, *job.overrides, f"run={quoted(job.run.path)}"]


def _of_the_job(overrides: Sequence[str]) -> list[str]:
    return [text for text in overrides if not text.startswith(("hydra.", "hydra/"))]


def _returned(job: Job) -> JobReturn:
    done = job.state == "completed"
    result = JobReturn() if done else FailedJob()
    result.overrides, result.working_dir, result.task_name = job.overrides, str(job.run.path), "train"
    result.status = JobStatus.COMPLETED if done else JobStatus.FAILED
    result._return_value = job.run.best_accuracy() if done else JobFailed(job.ending())
    return result


@contextlib.contextmanager
def _telling(sweep: Sweep) -> Iterator[Say]:
    """Lines that stay, beneath them on a terminal a live table; sweep.json is written with each line."""
    console = Console(highlight=False, soft_wrap=True)
    live = Live(
        get_renderable=lambda: table(sweep.jobs(), rows=SHOWN_JOBS),
        console=console,
        refresh_per_second=2,
        transient=True,
    )

    def say(line: str) -> None:
        console.print(line, markup=False)
        sweep.write()

    with live if console.is_terminal else contextlib.nullcontext():
        yield say
