"""The start and the end of a process that torchrun started beside others.

torchrun ends all processes as soon as one has failed, and prints what each of them wrote. So the first that
fails prints why before it ends; the others wait for it and end with its exit code, silently.

torch is imported only if there are several processes.
"""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from capsexp.errors import RunStopped, UserError, exit_code, first_line, print_error

if TYPE_CHECKING:
    from capsexp.training.parallel import ProcessGroup

VARIABLES = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
PATIENCE = timedelta(minutes=10)  # to wait for another process: rank 0 may have to save before it ends

_store: Any = None  # key-value store that the processes share; None for a single process


def is_distributed() -> bool:
    """Return whether torchrun, or a launcher that sets the same variables, started several processes."""
    if not {*VARIABLES} <= {*os.environ}:
        return False
    wrong = [f"{name}={os.environ[name]}" for name in VARIABLES if not os.environ[name].isdecimal()]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: torchrun sets a whole number; unset it to train in one process")
    return int(os.environ["WORLD_SIZE"]) > 1


def processes() -> "ProcessGroup":
    """Return the processes of this run."""
    from capsexp.training.parallel import SINGLE, ProcessGroup

    if not is_distributed():
        return SINGLE
    return ProcessGroup(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def launcher() -> list[str]:
    """Return the arguments before `capsexp` in a command that starts as many processes; none for one."""
    if not is_distributed():
        return []
    here, everywhere = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    return ["torchrun", f"--nnodes={everywhere // here}", f"--nproc-per-node={here}", "-m"]


def run_distributed(work: Callable[[], int]) -> int:
    """Do the work of one process of several; see `report_once`."""
    import torch.distributed as dist

    _join()
    with report_once():
        code = work()
    dist.destroy_process_group()
    return code


@contextlib.contextmanager
def report_once() -> Iterator[None]:
    """Print an error of the work inside once, even if several processes fail; end all with its exit code."""
    try:
        yield
    except BaseException as error:
        if _store is None:
            raise
        _end(error)


def _join() -> None:
    global _store
    import torch.distributed as dist
    from torch.cuda import is_available
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    with _reaching_the_others():
        store, rank, size = next(iter(rendezvous("env://", timeout=PATIENCE)))
    # Gloo beside NCCL: data in CPU memory need not pass through the accelerator.
    backend = "cpu:gloo,cuda:nccl" if is_available() and dist.is_nccl_available() else "gloo"
    # A restart by torchrun finds the store of the earlier attempt, with the addresses of dead processes.
    _store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun counts by itself, and anew after a loss
        _check_number(rank, size)
    with _reaching_the_others():
        dist.init_process_group(backend, store=_store, rank=rank, world_size=size)
    if rank == 0:
        # torchrun sends SIGTERM when another process has ended. Rank 0 still has to record how the run
        # ended, and notices the loss by itself. While it trains, `StopSignal` handles the signal.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler would wait for the end of an exchange
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - open as long as the process


@contextlib.contextmanager
def _reaching_the_others() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:  # no answer, no address
        raise UserError(f"cannot reach the other processes of this run: {first_line(error)}") from None


def _check_number(rank: int, size: int) -> None:
    """Check that all processes count the same number of processes, and that each has a rank of its own.

    Raises:
        UserError: they do not.
    """
    sizes = {int(_store.compare_set("size", "", str(size))), size}
    if len(sizes) > 1:
        numbers = " and ".join(map(str, sorted(sizes)))
        raise UserError(f"the processes of this run differ in WORLD_SIZE, their number: {numbers}")
    if _store.add(f"rank {rank}", 1) > 1:
        raise UserError(f"two processes of this run have RANK={rank}")


def _end(error: BaseException) -> NoReturn:
    """Print why, or wait until another process has; then end with the same exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    code = exit_code(error)
    if isinstance(error, SystemExit):  # printed where it was raised
        pass
    elif _reports(error):
        sys.stderr = sys.__stderr__
        if isinstance(error, UserError):
            print_error(error)
        elif not isinstance(error, KeyboardInterrupt):
            traceback.print_exception(error)
        with contextlib.suppress(RuntimeError):
            _store.set("exit code", str(code))
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the other may have died: then torchrun ends this one
        with contextlib.suppress(RuntimeError):
            _store.wait(["exit code"], PATIENCE)
            code = int(_store.get("exit code"))
    sys.stdout.flush()
    # Not sys.exit: threads of a broken process group abort a process that cleans up.
    os._exit(code)


def _reports(error: BaseException) -> bool:
    """Return whether this process prints why: the first to fail, or rank 0 if all of them stop alike."""
    if isinstance(error, RunStopped) and os.environ["RANK"] != "0":
        return False
    try:
        return bool(_store.add("ends", 1) == 1)
    except RuntimeError:  # torchrun has died, and the store with it
        return True
