"""Python programs that start at once: forks of a server that has imported what else takes each of them seven seconds.

    start_server()  # once for all tests
    subprocess.run([python(), "-m", "vavae_tools.train", …])  # as with sys.executable

The program runs in a fork of the server, and so do those that it starts by `sys.executable`. What is called stands for
it: a small process with its streams, which passes signals on and dies as it did. A few tests start real interpreters.
"""

import os
import signal
import socket
import struct
import subprocess
import sys
from contextlib import suppress

FOLDER = "VAVAE_FORKS"
"""Environment variable: where the server listens, for all test processes."""
PRELOADED = ("lightning", "torch.distributed.run", "ipykernel.kernelapp", "tensorboard.summary.writer")
"""Beside what the package imports."""
AFRESH = ("vavae_tools", "tqdm")
"""What each program imports by itself: the package, and bars, which are others in a notebook."""
NUMBER = struct.Struct("i")
PASSED_ON = (signal.SIGINT, signal.SIGTERM)


def start_server() -> subprocess.Popen | None:
    """Start it, to end with its standard input. Imports take place when the first program is started."""
    import tempfile
    from pathlib import Path

    if not hasattr(os, "pidfd_open"):  # of Linux
        return None
    folder = os.environ[FOLDER] = tempfile.mkdtemp(prefix="forks-")
    script = Path(folder) / "python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" ask "{folder}" "$@"\n')
    script.chmod(0o700)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # which counts as torch is imported
    command = [sys.executable, __file__, "serve", folder]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)


def python() -> str:
    """What takes the place of `sys.executable`; that itself where no server can be."""
    return f"{os.environ[FOLDER]}/python" if FOLDER in os.environ else sys.executable


def torchrun(script: str, *words: object, count: int = 2) -> subprocess.CompletedProcess:
    """Run a test's own file in so many processes."""
    tests = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120
    path = os.pathsep.join([os.path.dirname(tests), tests])  # noqa: PTH120
    command = [python(), "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, timeout=240, env=environment, check=False
    )


def fork_of(pid: int) -> int:
    """The process that runs the program for which `python` stands as `pid`; any other stands for itself."""
    try:
        with open(f"{os.environ[FOLDER]}/{pid}") as file:  # noqa: PTH123
            return int(file.read())
    except (OSError, KeyError):
        return pid


def ask(folder: str, *words: str) -> None:
    """What `python` does: let the server run the program."""
    import json

    with socket.socket(socket.AF_UNIX) as server:
        server.connect(f"{folder}/socket")
        program = json.dumps([f"{folder}/python", words, dict(os.environ), os.path.realpath(".")]).encode()
        socket.send_fds(server, [NUMBER.pack(len(program))], [0, 1, 2])
        server.sendall(program)
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: server.send(bytes([number])))
        with open(f"{folder}/{os.getpid()}", "w") as file:  # noqa: PTH123
            file.write(str(_number(server)))
        status = _number(server)
    os.unlink(file.name)  # noqa: PTH108
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status in PASSED_ON else None
        os.kill(os.getpid(), -status)
    os._exit(status)


def _number(server: socket.socket) -> int:
    return NUMBER.unpack(server.recv(NUMBER.size, socket.MSG_WAITALL))[0]


def serve(folder: str) -> None:
    """Fork for each program that is asked for, until the one that started this server has ended."""
    import select
    import shutil

    path = sys.path[1:]
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{folder}/socket")
            listener.listen(64)
            preload = True
            while 0 not in select.select([listener, 0], [], [])[0]:
                client, _ = listener.accept()
                if preload:
                    _preload()
                    preload = False
                if not os.fork():
                    listener.close()
                    _watch(client, path)
                client.close()
                with suppress(ChildProcessError):
                    while os.waitpid(-1, os.WNOHANG)[0]:
                        pass
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _preload() -> None:
    import gc
    import importlib
    import pkgutil

    import vavae_tools

    ours = [module.name for module in pkgutil.walk_packages(vavae_tools.__path__, "vavae_tools.")]
    for name in (*PRELOADED, *(name for name in ours if not name.endswith("__main__"))):
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.split(".")[0] in AFRESH]:
        del sys.modules[name]
    gc.freeze()  # what stays for good needs not be looked at, or copied, by each of them


def _watch(client: socket.socket, path: list[str]) -> None:
    """Run a program in a fork of this one, whose status the client gets, and which ends with it."""
    import json
    import select

    length, streams, _, _ = socket.recv_fds(client, NUMBER.size, 3)
    program = json.loads(client.recv(NUMBER.unpack(length)[0], socket.MSG_WAITALL))
    pid = os.fork()
    if not pid:
        client.close()
        _become(path, streams, *program)
    for stream in streams:
        os.close(stream)
    client.sendall(NUMBER.pack(pid))
    ended = os.pidfd_open(pid)
    while True:
        ready, _, _ = select.select([client, ended], [], [])
        if ended in ready:
            client.sendall(NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
            os._exit(0)
        numbers = client.recv(16)
        for number in numbers:
            os.kill(pid, number)
        if not numbers:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os._exit(0)


def _become(
    path: list[str], streams: list[int], python: str, words: list[str], environment: dict[str, str], folder: str
) -> None:
    """Run `python *words` in this process, as an interpreter does."""
    import atexit
    import runpy
    import threading

    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, 256)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    unbuffered = "-u" in words[:2]
    while words[0] not in ("-m", "-c") and words[0].startswith("-"):
        words.pop(0)
    how = words.pop(0) if words[0] in ("-m", "-c") else ""
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", 1 if unbuffered or os.isatty(1) else -1, closefd=False)  # noqa: SIM115
    sys.stdout.reconfigure(write_through=unbuffered)
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.executable, sys.argv = python, [how, *words[1:]] if how else words
    first = "" if how == "-c" else folder if how else os.path.dirname(words[0])  # noqa: PTH120
    sys.path[:] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *path]
    status = 0
    try:
        if how == "-m":
            sys.modules.pop(words[0], None)  # it may be preloaded
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        elif how == "-c":
            exec(words[0], vars(sys.modules["__main__"]))
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    if status < 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 255)


if __name__ == "__main__":
    {"ask": ask, "serve": serve}[sys.argv[1]](*sys.argv[2:])
