"""A Python that has already imported torch, DeepSpeed and DALI, for processes that tests start.

The imports take two seconds of a core, the work of a small run half a second. So each pytest
process keeps a server with all imports done, and `warm.python()` is an executable to use in place
of `sys.executable`: it asks the server to fork, and the fork runs the script as a fresh interpreter
would, with the caller's arguments, environment, folder, limits and open stdin, stdout and stderr.
The executable waits for the fork, forwards signals to it, and ends as it ended. If the executable
is killed, so is the fork. Processes that the script starts with `sys.executable` work the same way.
`warm.Fork` calls a function in such a fork, without an executable in between.

A real interpreter handles what a fork cannot: Python's own options, scripts outside this checkout,
modules other than `MODULES`, and code that does not begin with `MARK`. Tests about imports, about a
parent that is killed, or about variables that are read while libraries load use `sys.executable`.
"""

from __future__ import annotations

import atexit
import base64
import functools
import gc
import io
import json
import os
import pickle
import resource
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
    "torch.distributed.run",
    "accelerate.commands.launch",
    "launch.doctor",
    "launch.selfcheck",
    "launch.selfcheck.child",
    "pipeline.models.info",
)
"""Modules that `-m` may run in a fork."""
WATCHED = "VASTSCALE_EVALUATION_PARENT"
MARK = "# warm\n"
"""Start of code that `-c` may run in a fork."""
BEFORE = "WARM_BEFORE"
"""Environment variable: Python code that runs before each script, to inject a fault into it."""
REAL = "WARM_REAL"
"""Environment variable: path of one script that a real interpreter runs, for a script that must
notice the end of its parent. What it starts runs in forks again."""
PRELOAD = (
    "torch",
    "torch._dynamo",
    "torch.utils.cpp_extension",
    "torch.utils.tensorboard",
    "torch.profiler",
    "deepspeed",
    "deepspeed.module_inject",
    "deepspeed.moe.layer",
    "deepspeed.ops.adam",
    "accelerate",
    "nvidia.dali.fn",
    "nvidia.dali.pipeline",
    "nvidia.dali._autograph",
    "cv2",
    "numpy.ma",
    "PIL.PngImagePlugin",
    "PIL.JpegImagePlugin",
    "PIL.ImageSequence",
    "pydantic",
    "typeguard",
    "tyro.extras",
    "tyro._backends",
    "packaging.requirements",
    "launch.environment",
    "pipeline.training.run",
    "pipeline.evaluation.command",
    "pipeline.inference.command",
)
"""Including modules that these import late: torch's optimizers import torch._dynamo, 950
modules."""
HANDED_ON = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCONT,
)
LIMITS = (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE, resource.RLIMIT_AS, resource.RLIMIT_DATA)
_LENGTH = struct.Struct("!I")

CLIENT = """\
#!{python} -ISE
import json, os, resource, signal, socket, struct, sys
words = sys.argv[1:]
while words and words[0] == "-u":
    words = words[1:]
script = os.path.realpath(words[0]) if words else ""
known = (words[1] in {modules!r} if words[:1] == ["-m"] and len(words) > 1 else
         words[1].startswith({mark!r}) if words[:1] == ["-c"] and len(words) > 1 else
         script.startswith({root!r}) and script.endswith(".py"))
if {watched!r} in os.environ:
    # a process of an evaluation checks whether its parent is still the same process
    known = False
server = socket.socket(socket.AF_UNIX)
try:
    for number in range(3):
        os.fstat(number)
except OSError:  # one of stdin, stdout and stderr is closed
    known = False
if known and script == os.environ.get({real!r}):
    code = ("import os, runpy, sys; sys.executable, *sys.argv = sys.argv[1:]; "
            "exec(os.environ.get('" + {before!r} + "', '')); "
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    os.execv({python!r}, [{python!r}, "-u", "-c", code, {executable!r}, script, *words[1:]])
if not known:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server.connect({address!r})
child, waiting = 0, []
def hand_on(number, frame):
    os.kill(child, number) if child else waiting.append(number)
for number in {handed_on!r}:
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, hand_on)
limits = {{number: resource.getrlimit(number) for number in {limits!r}}}
request = json.dumps(dict(
    words=words, limits=limits, folder=os.getcwd(), environment=dict(os.environ),
    umask=os.umask(0o22), unbuffered=words is not sys.argv[1:] and "-u" in sys.argv[1:2],
    ignored=[n for n in {handed_on!r} if signal.getsignal(n) == signal.SIG_IGN])).encode()
socket.send_fds(server, [struct.pack("!I", len(request))], [0, 1, 2])
server.sendall(request)
for number in range(3):
    os.close(number)
child = int.from_bytes(server.recv(4, socket.MSG_WAITALL), "big")
for number in waiting:
    os.kill(child, number)
status = int.from_bytes(server.recv(4, socket.MSG_WAITALL), "big")
if os.WIFSIGNALED(status):
    if os.WTERMSIG(status) != signal.SIGKILL:
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
    os.kill(os.getpid(), os.WTERMSIG(status))
os._exit(os.WEXITSTATUS(status))
"""


@functools.cache
def python() -> str:
    """Return the executable. Its server starts with the first call and ends with this process."""
    folder = tempfile.mkdtemp(prefix="warm-")
    address, executable = f"{folder}/socket", Path(folder) / "python"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    executable.write_text(
        CLIENT.format(
            python=sys.executable,
            modules=MODULES,
            mark=MARK,
            watched=WATCHED,
            root=f"{ROOT}{os.sep}",
            address=address,
            limits=LIMITS,
            handed_on=tuple(map(int, HANDED_ON)),
            before=BEFORE,
            real=REAL,
            executable=str(executable),
        )
    )
    executable.chmod(0o755)
    variables = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # as train.py sets it before torch is loaded
        "PYTHONPATH": str(ROOT),
    }
    server = subprocess.Popen(
        [sys.executable, __file__, str(listener.fileno()), str(executable)],
        env=variables,
        pass_fds=[listener.fileno()],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    listener.close()
    atexit.register(_end, server, Path(folder), os.getpid())
    return str(executable)


CALL = """\
import base64, os, pickle, sys, traceback
sys.path[:] = {path!r}
status = 0
try:
    function, arguments = pickle.loads(base64.b64decode({call!r}))
    function(*arguments)
except SystemExit as error:
    status = error.code if isinstance(error.code, int) else error.code is not None
except BaseException:
    traceback.print_exc()
    status = 1
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)
"""


class Fork:
    """A process that calls `function(*arguments)`, with methods of `multiprocessing.Process`.

    `function` is looked up by its module and name. The process is killed when this process ends.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        code = CALL.format(
            path=sys.path, call=base64.b64encode(pickle.dumps((function, arguments)))
        )
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(str(Path(python()).with_name("socket")))
        request = json.dumps(
            {
                "words": ["-c", MARK + code],
                "limits": {number: resource.getrlimit(number) for number in LIMITS},
                "folder": os.getcwd(),
                "environment": dict(os.environ),
                "umask": 0o22,
                "unbuffered": False,
                "ignored": [],
            }
        )
        socket.send_fds(self._connection, [_LENGTH.pack(len(request.encode()))], [0, 1, 2])
        self._connection.sendall(request.encode())
        (self.pid,) = _LENGTH.unpack(self._connection.recv(_LENGTH.size, socket.MSG_WAITALL))
        self.exitcode: int | None = None

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end; `exitcode` stays None if it does not end within `timeout` seconds."""
        if self.exitcode is None and select.select([self._connection], [], [], timeout)[0]:
            (status,) = _LENGTH.unpack(self._connection.recv(_LENGTH.size, socket.MSG_WAITALL))
            self.exitcode = os.waitstatus_to_exitcode(status)
            self._connection.close()

    def is_alive(self) -> bool:
        self.join(0)
        return self.exitcode is None

    def kill(self) -> None:
        """Kill it with SIGKILL, unless it has ended."""
        if self.is_alive():
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.join()


def _end(server: subprocess.Popen[bytes], folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        server.kill()
        server.wait()
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def _serve(listener: socket.socket) -> dict[str, Any]:
    """Fork for each request; returns only in the forks, with the request.

    The server exits when the process at the other end of stdin does.
    """
    children: dict[int, socket.socket] = {}
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    selector = selectors.DefaultSelector()
    for source in (listener, woken, sys.stdin):
        selector.register(source, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                for pid in children:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            elif key.fileobj is woken:
                with suppress(BlockingIOError):
                    woken.recv(4096)
                _report_the_ended(children, selector)
            elif key.fileobj is listener:
                connection, _ = listener.accept()
                if request := _read(connection):
                    pid = os.fork()
                    if pid == 0:
                        signal.set_wakeup_fd(-1)
                        selector.close()
                        for other in (connection, woken, wake, listener, *children.values()):
                            other.close()
                        return request
                    children[pid] = connection
                    for number in request["files"]:
                        os.close(number)
                    selector.register(connection, selectors.EVENT_READ, pid)
                    with suppress(OSError):
                        connection.sendall(_LENGTH.pack(pid))
            else:  # the executable ended before its fork
                selector.unregister(key.fileobj)
                if key.data in children:
                    os.kill(key.data, signal.SIGKILL)


def _report_the_ended(children: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        connection = children.pop(pid)
        with suppress(KeyError):
            selector.unregister(connection)
        with suppress(OSError):
            connection.sendall(_LENGTH.pack(status))
        connection.close()


def _read(connection: socket.socket) -> dict[str, Any] | None:
    head, files, _, _ = socket.recv_fds(connection, _LENGTH.size, 3)
    if len(head) != _LENGTH.size:
        return None
    size, parts = _LENGTH.unpack(head)[0], []
    while size and (part := connection.recv(size)):
        parts.append(part)
        size -= len(part)
    return None if size else {**json.loads(b"".join(parts)), "files": files}


def _become(request: dict[str, Any]) -> tuple[str, str]:
    """Make this fork like a fresh interpreter; return the code of `__main__`, and its file."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in HANDED_ON:
        signal.signal(
            number,
            signal.SIG_IGN
            if number in request["ignored"]
            else signal.default_int_handler
            if number == signal.SIGINT
            else signal.SIG_DFL,
        )
    for number, file in enumerate(request["files"]):
        os.dup2(file, number)
        os.close(file)
    os.umask(request["umask"])
    for limit, value in request["limits"].items():
        resource.setrlimit(int(limit), tuple(value))
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    unbuffered = request["unbuffered"] or bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(open(number, mode, closefd=False), encoding="utf-8")  # noqa: SIM115
        for number, mode in enumerate(("rb", "wb", "wb"))
    )
    sys.stdout.reconfigure(line_buffering=os.isatty(1), write_through=unbuffered)
    sys.stderr.reconfigure(line_buffering=True, errors="backslashreplace")
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    sys.executable = sys.argv[2]

    import random

    import numpy as np
    import torch

    random.seed()
    np.random.seed()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(int(threads) if threads.isdigit() else len(os.sched_getaffinity(0)))
    words = request["words"]
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    kept = [path for path in sys.path if path not in (str(ROOT), str(ROOT / "benchmarks"))]
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path[:] = ["", *paths, *kept]
        return words[1], "<string>"
    if words[0] == "-m":
        import importlib.util

        name = words[1]
        sys.path[:] = [os.getcwd(), *paths, *kept]
        spec = importlib.util.find_spec(name)
        if spec.submodule_search_locations is not None:
            name = f"{name}.__main__"
            spec = importlib.util.find_spec(name)
        sys.argv = [spec.origin, *words[2:]]
        globals()["__package__"] = name.rpartition(".")[0]
        globals()["__spec__"] = spec
        file = spec.origin
    else:
        sys.argv, file = words, words[0]
        sys.path[:] = [os.path.dirname(os.path.realpath(file)), *paths, *kept]
    return Path(file).read_text(encoding="utf-8"), file


def _run(code: str, main: dict[str, Any]) -> NoReturn:
    """Run the script in `main`, then end as an interpreter does, but without tearing down modules.

    Freeing a million objects would copy every memory page that holds them: 0.4 s of a core, ten
    times what the fork and a short script need. `main` is the emptied namespace of this module, so
    everything needed afterwards is imported here.
    """
    import atexit
    import os
    import signal
    import sys
    import threading

    status, interrupted = 0, False
    try:
        exec(os.environ.get("WARM_BEFORE", ""), {})
        exec(compile(code, main["__file__"], "exec"), main)
    except SystemExit as error:
        if isinstance(error.code, int):
            status = error.code & 0xFF
        elif error.code is not None:
            print(error.code, file=sys.stderr)
            status = 1
    except BaseException as error:
        sys.excepthook(
            type(error), error.with_traceback(error.__traceback__.tb_next), error.__traceback__
        )
        status, interrupted = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError as error:
            status = 120
            if stream is sys.stdout:
                print(f"Exception ignored in: {stream!r}\n{error!r}", file=sys.stderr)
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status)


if __name__ == "__main__":
    for _name in PRELOAD:
        __import__(_name)
    # DALI rewrites the graph's functions when it builds the first one, which takes longer than all
    # else in a short run.
    _make_graph = sys.modules["pipeline.data.reader"]._whole_image_graph
    _make_graph(
        __import__("pipeline.data.degradations.bicubic", fromlist=["BicubicSpec"]).BicubicSpec,
        "{}",
        2,
        (8, 8),
        False,
    )
    _make_graph.cache_clear()
    gc.collect()
    gc.freeze()  # else the first collection in a fork copies every page that it visits
    _code, __file__ = _become(_serve(socket.socket(fileno=int(sys.argv[1]))))
    _main, _go = sys.modules["__main__"].__dict__, _run
    for _key in [
        key for key in _main if not key.startswith("__") and key not in ("_main", "_code", "_go")
    ]:
        del _main[_key]
    del _key
    _go(_code, _main)
