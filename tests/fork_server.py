"""Start commands of capsexp by forking a process that has imported torch and Hydra: 0.3 s instead of 3 s.

`install` makes `subprocess.Popen` do so, in the tests and in the forked processes: for `python -m capsexp`,
for `python -P -c` with a program that imports capsexp.cli, as the jobs of a sweep are started, and for
files of this folder. They are processes like others, each with its own id, folder, environment, files and
session, and signals reach them. They import capsexp themselves, so PYTHONPATH, and what capsexp reads at
import, have their effect. Other commands start in the usual way; so do commands with `NO_FORK` in their
environment, or with another value of a variable that Python or torch reads when it starts.

As a program, this file is the server: `python fork_server.py SOCKET` serves until its stdin closes.
"""

import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types

NO_FORK = "CAPSEXP_NO_FORK"
# Variables that Python or a library reads when it starts, except those that `become` applies.
READ_AT_START = ("PYTHON", "LD_", "LC_", "LANG", "OMP_", "MKL_", "OPENBLAS_", "ATEN_", "ONEDNN_", "DNNL_")
READ_AT_START += ("MALLOC_", "TORCH_", "TRITON_", "JAXTYPING_")
READ_LATER = ("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUNBUFFERED", "TORCH_EXTENSIONS_DIR")
# What takes long to import. Nothing here starts a thread; nothing here is part of capsexp.
PRELOADED = (
    *("torch", "torch.utils.tensorboard", "torch._dynamo", "torch.library"),
    *("torchvision.transforms.v2", "torchvision.datasets", "triton", "hydra.main", "hydra._internal.hydra"),
    *("rich.live", "rich.table", "jinja2", "sklearn.datasets", "scipy.io", "scipy.stats"),
)
PYTHON = sys.executable
HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")
SystemPopen = subprocess.Popen


class Popen(SystemPopen):
    """`subprocess.Popen`, whose process is a fork of the server where that is the same."""

    address = None
    """The server's socket."""
    _connection = None

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others):
        special = any((executable, preexec_fn, pass_fds))
        if special or not is_command(args) or not self._fork(args, cwd, env, *others):
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others)

    def _fork(self, args, cwd, env, startupinfo, creationflags, shell, *others):
        *files, _restore_signals, gid, gids, uid, umask, new_session, group = others
        if shell or umask != -1 or group != -1 or {gid, uid, gids} != {None}:
            return False
        own = [number if file == -1 else file for number, file in enumerate((files[0], files[3], files[5]))]
        variables = os.environ if env is None else env
        request = {
            "options": [os.fspath(argument) for argument in args[1:]],
            "folder": os.path.abspath(os.fsdecode(cwd or os.curdir)),
            "environment": {os.fsdecode(name): os.fsdecode(value) for name, value in variables.items()},
            "new_session": bool(new_session),
        }
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(server_address())
        text = json.dumps(request).encode()
        socket.send_fds(connection, [len(text).to_bytes(4, "big")], own)
        connection.sendall(text)
        self.pid = receive_number(connection)
        if not self.pid:
            connection.close()
            return False
        self._connection, self._child_created = connection, True
        self._close_pipe_fds(*files)
        return True

    def _try_wait(self, wait_flags):
        if self._connection is None:
            return super()._try_wait(wait_flags)
        if wait_flags & os.WNOHANG and not select.select([self._connection], [], [], 0)[0]:
            return 0, 0
        status = receive_number(self._connection)
        self._connection.close()
        return self.pid, status

    def _internal_poll(self, *arguments, **options):
        if self._connection is None:
            return super()._internal_poll(*arguments, **options)
        if self._waitpid_lock.acquire(blocking=False):
            try:
                if self.returncode is None:
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid == self.pid:
                        self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def install():
    """Let this process, and those that the server forks, use the server."""
    subprocess.Popen = Popen


def is_command(arguments):
    """Return whether these are the arguments of a command of capsexp."""
    if isinstance(arguments, str | bytes | os.PathLike) or arguments[0] != PYTHON:
        return False
    arguments = [os.fspath(argument) for argument in arguments if argument != "-P"]
    is_job = arguments[1] == "-c" and "from capsexp.cli" in arguments[2]
    return arguments[1:3] == ["-m", "capsexp"] or is_job or arguments[1].startswith(HERE)


def server_address():
    """Return the server's socket; start the server if there is none."""
    if Popen.address is None:
        folder = tempfile.mkdtemp(prefix="fork-server-")
        Popen.address = os.path.join(folder, "socket")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [PYTHON, "-P", __file__, Popen.address]
        server = SystemPopen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        server.stdout.read(1)  # it listens

        def end():
            server.stdin.close()
            server.wait()
            server.stdout.close()
            shutil.rmtree(folder)

        atexit.register(end)
    return Popen.address


def script():
    """Return the text of an executable that does the same as `python -m capsexp`."""
    return f"""#!{PYTHON} -IS
import sys
sys.path.insert(0, {HERE!r})
import fork_server
fork_server.Popen.address = {server_address()!r}
sys.exit(fork_server.Popen([fork_server.PYTHON, "-P", "-m", "capsexp", *sys.argv[1:]]).wait())
"""


def receive(connection, size):
    """Return exactly so many bytes."""
    data = b""
    while len(data) < size:
        if not (part := connection.recv(size - len(data))):
            raise ConnectionError("the other side is gone")
        data += part
    return data


def receive_number(connection):
    """Return a number of four bytes."""
    return int.from_bytes(receive(connection, 4), "big")


def starts_alike(variables):
    """Return whether a process with this environment starts as this one did."""

    def read_at_start(environment):
        return {
            name: value
            for name, value in environment.items()
            if name.startswith(READ_AT_START) and name not in READ_LATER
        }

    return NO_FORK not in variables and read_at_start(variables) == read_at_start(os.environ)


def serve(address):
    """Fork a process for each request. Return, in that process, the request and its three files."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert not any(name.partition(".")[0] == "capsexp" for name in sys.modules)
    gc.collect()
    gc.freeze()  # so that the children's garbage collections do not copy these pages
    Popen.address = address
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(100)
    os.write(1, b"!")
    connections = {}
    while True:
        ready, _, _ = select.select([0, woken, listener], [], [])
        if 0 in ready:  # stdin has closed
            sys.exit()
        if woken in ready:
            os.read(woken, 1000)
            report_ends(connections)
        if listener in ready:
            connection, _ = listener.accept()
            head, files, _, _ = socket.recv_fds(connection, 4, 3)
            request = json.loads(receive(connection, int.from_bytes(head, "big")))
            pid = os.fork() if starts_alike(request["environment"]) else -1
            if pid == 0:
                return request, files
            connection.sendall(max(pid, 0).to_bytes(4, "big"))
            connections[pid] = connection
            for file in files:
                os.close(file)


def report_ends(connections):
    """Report the status of the children that have ended."""
    with contextlib.suppress(ChildProcessError):
        while (end := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            with contextlib.suppress(OSError), connections.pop(end[0]) as connection:
                connection.sendall(end[1].to_bytes(4, "big"))


def become(request, files):
    """Give this process the files, the folder, the environment and the path of the command."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if request["new_session"]:
        os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.closerange(3, 1000)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    safe = "-P" in request["options"][:2] or os.environ.get("PYTHONSAFEPATH")
    own = [] if safe else [request["folder"]]
    sys.path[:0] = [*own, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    importlib.invalidate_caches()
    if os.environ.get("PYTHONUNBUFFERED"):
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(
                io.FileIO(number, "w", closefd=False),
                encoding=stream.encoding,
                errors=stream.errors,
                write_through=True,
            )
            for number, stream in ((1, sys.stdout), (2, sys.stderr))
        )
    else:
        sys.stdout.reconfigure(line_buffering=os.isatty(1))
    sys.modules["numpy"].random.seed()
    install()


def run(options):
    """Run the module or the program of the interpreter's options."""
    if options[0] == "-P":
        options = options[1:]
    sys.argv = ["-c", *options[2:]]
    if options[0] == "-m":
        runpy.run_module("capsexp", run_name="__main__", alter_sys=True)
    elif options[0] != "-c":
        sys.argv = options
        sys.path.insert(0, os.path.dirname(options[0]))
        runpy.run_path(options[0], run_name="__main__")
    else:
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(options[1], vars(sys.modules["__main__"]))


if __name__ == "__main__":
    asked, streams = serve(sys.argv[1])
    become(asked, streams)
    run(asked["options"])
