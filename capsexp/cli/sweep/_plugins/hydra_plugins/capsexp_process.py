"""`hydra/launcher=process`, in the only namespace where Hydra looks for plugins.

Hydra imports this file at every start, so the work and its imports are in capsexp.cli.sweep.launcher.
"""

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ProcessLauncher(Launcher):
    """Run each job of a sweep in its own process.

    Args:
        n_jobs: number of parallel jobs; None means one for each GPU, or one.

    Raises:
        ValueError: n_jobs is not an integer >= 1.
    """

    def __init__(self, *, n_jobs: int | None) -> None:
        if n_jobs is not None and not (isinstance(n_jobs, int) and n_jobs >= 1):
            raise ValueError(f"n_jobs must be an integer >= 1 or null, got {n_jobs!r}")
        self.n_jobs = n_jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep the context and the config of the sweep."""
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs. Return a result for each, failed or not, in the order of `job_overrides`."""
        from capsexp.cli.sweep.launcher import launch

        return launch(
            self.hydra_context, self.config, job_overrides, first_number=initial_job_idx, n_jobs=self.n_jobs
        )
