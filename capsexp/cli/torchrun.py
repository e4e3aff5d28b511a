"""One process of several that torchrun started, from its first word to its last.

torchrun ends all processes as soon as one has failed, and prints what each of them wrote. So one that fails
says why before it ends, and the others wait for it and end with its exit code, without a word.

torch is imported only when there are several.
"""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NoReturn

from capsexp.errors import RunStopped, UserError, exit_code

VARIABLES = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
PATIENCE = timedelta(minutes=10)  # to wait at the end for the words of another: the lead may have to save
PrintError = Callable[[UserError], int]

_store: Any = None  # where the processes leave word for each other; None for a process alone


def is_distributed() -> bool:
    """Whether torchrun, or what sets the same variables, started this process beside others."""
    return {*VARIABLES} <= {*os.environ} and int(os.environ["WORLD_SIZE"]) > 1


def processes() -> Any:
    """The processes of this run (`capsexp.training.parallel.ProcessGroup`)."""
    from capsexp.training.parallel import SINGLE, ProcessGroup

    if not is_distributed():
        return SINGLE
    return ProcessGroup(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def launcher() -> list[str]:
    """The words before `capsexp` in a command that starts as many processes; none for one alone."""
    if not is_distributed():
        return []
    here, everywhere = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    return ["torchrun", f"--nnodes={everywhere // here}", f"--nproc-per-node={here}", "-m"]


def run_distributed(work: Callable[[], int], print_error: PrintError) -> int:
    """Do the work of one process of several; see `report_once`."""
    import torch.distributed as dist

    _join()
    with report_once(print_error):
        code = work()
    dist.destroy_process_group()
    return code


@contextlib.contextmanager
def report_once(print_error: PrintError) -> Iterator[None]:
    """If the work inside fails in several processes: one says why, and all end with its exit code.

    Args:
        print_error: prints a user's mistake.
    """
    try:
        yield
    except BaseException as error:
        if _store is None:
            raise
        _end(error, print_error)


def _join() -> None:
    global _store
    import torch.distributed as dist
    from torch.cuda import is_available
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(iter(rendezvous("env://")))
    # Gloo beside NCCL: what lies in memory need not pass through the accelerator.
    backend = "cpu:gloo,cuda:nccl" if is_available() and dist.is_nccl_available() else "gloo"
    # A restart by torchrun finds the store of the attempt before, with the addresses of dead processes.
    _store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=_store, rank=rank, world_size=size)
    if rank == 0:
        # torchrun sends it when another process has ended. This one still has to write down how the run
        # ended, and finds out about the loss by itself. While it trains, `StopSignal` listens.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process


def _end(error: BaseException, print_error: PrintError) -> NoReturn:
    """Say why, or wait until another process has; then end with the same exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    code = exit_code(error)
    if isinstance(error, SystemExit):  # was told where it was raised
        pass
    elif _reports(error):
        sys.stderr = sys.__stderr__
        print_error(error) if isinstance(error, UserError) else traceback.print_exception(error)
        with contextlib.suppress(RuntimeError):
            _store.set("exit code", str(code))
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the other may have died: torchrun knows
        with contextlib.suppress(RuntimeError):
            _store.wait(["exit code"], PATIENCE)
            code = int(_store.get("exit code"))
    sys.stdout.flush()
    # Not sys.exit: threads of a broken group abort a process that clears up.
    os._exit(code)


def _reports(error: BaseException) -> bool:
    """Whether this process says why: the first to fail, or the lead if all of them stop alike."""
    if isinstance(error, RunStopped) and os.environ["RANK"] != "0":
        return False
    try:
        return bool(_store.add("ends", 1) == 1)
    except RuntimeError:  # torchrun has died, and nobody can be asked
        return True
