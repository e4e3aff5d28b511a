"""`hydra/launcher=process`, in the one namespace where Hydra looks for plugins.

Hydra imports this file at every start, so the work is done, and imported, in capsexp.cli.sweep.launcher.
"""

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ProcessLauncher(Launcher):
    """Runs each job of a sweep as a process of its own.

    Args:
        n_jobs: jobs at a time; None is one for each GPU, or one.

    Raises:
        ValueError: n_jobs is no number >= 1.
    """

    def __init__(self, *, n_jobs: int | None) -> None:
        if n_jobs is not None and not (isinstance(n_jobs, int) and n_jobs >= 1):
            raise ValueError(f"n_jobs must be an integer >= 1 or null, got {n_jobs!r}")
        self.n_jobs = n_jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take over what Hydra has composed."""
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; their returns, failed ones among them, in the order of `job_overrides`."""
        from capsexp.cli.sweep.launcher import launch

        return launch(self.hydra_context, self.config, job_overrides, n_jobs=self.n_jobs)
