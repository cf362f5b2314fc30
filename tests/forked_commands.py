"""Commands in processes of their own that need not import torch again: each is forked from one that has."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

RECORD = json.dumps({"prompt": "Why? ", "completion": "so be it"}).encode() + b"\n"

_SERVER = """
import json, os, socket, sys
import torch, transformers, vhead.cli.app, vhead.scoring.files.pipeline, vhead.scoring.scorer
from vhead import Scorer
server = socket.socket(fileno=int(sys.argv[1]))
server.send(b"ready")
while True:
    request, streams, _, _ = socket.recv_fds(server, 1 << 16, 3)
    if not request:
        sys.exit()
    child = os.fork()
    if not child:
        break
    for stream in streams:
        os.close(stream)
    server.send(str(child).encode())
    server.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
server.close()
for number, stream in enumerate(streams):
    os.dup2(stream, number)
    os.close(stream)
arguments, before = json.loads(request)
sys.argv = ["vhead", *arguments]
sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), open(1, "w", closefd=False), open(2, "w", closefd=False)
exec(before)
vhead.cli.main()
"""


@dataclass
class Command:
    """A running command.

    Attributes:
        pid: Of its process.
        stdin: Where the test writes what it reads.
        stdout: Where the test reads what it writes.
    """

    pid: int
    stdin: int
    stdout: int
    _stderr: int
    _server: socket.socket
    _code: int | None = field(default=None)

    def send(self, number: signal.Signals) -> float:
        """Sends a signal; gives the seconds until the process has ended."""
        started = time.monotonic()
        os.kill(self.pid, number)
        self.wait()
        return time.monotonic() - started

    def wait(self, seconds: float = 30.0) -> int:
        """The exit code, negative for a signal; TimeoutError where the process has not ended by then."""
        if self._code is None:
            self._server.settimeout(seconds)
            self._code = int(self._server.recv(16))
        return self._code

    def errors(self) -> str:
        """What it wrote to standard error, once it has ended."""
        with open(self._stderr, closefd=False) as stream:
            return stream.read()

    def end(self) -> None:
        """Kills it where it has not ended, and closes the streams."""
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        for stream in (self.stdin, self.stdout, self._stderr):
            os.close(stream)


class Forks:
    """A process that has imported torch, and forks one for each command."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-c", _SERVER, str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        assert self._socket.recv(16) == b"ready"

    @contextmanager
    def run(self, *arguments: object, before: str = "") -> Iterator[Command]:
        """A command whose standard streams are pipes; `before` is Python that its process runs first."""
        stdin, stdout, stderr = os.pipe(), os.pipe(), os.pipe()
        theirs = [stdin[0], stdout[1], stderr[1]]
        request = json.dumps([list(map(str, arguments)), before]).encode()
        self._socket.settimeout(30.0)
        socket.send_fds(self._socket, [request], theirs)
        for stream in theirs:
            os.close(stream)
        command = Command(int(self._socket.recv(16)), stdin[1], stdout[0], stderr[0], self._socket)
        try:
            yield command
        finally:
            command.end()

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait(30)
        self._socket.close()


@contextmanager
def in_thread(work: Callable[[], object]) -> Iterator[None]:
    """Does it again and again, until it has nothing more to do or the block is left."""
    left = threading.Event()

    def repeat() -> None:
        while not left.is_set():
            try:
                if not work():
                    return
            except BlockingIOError:
                time.sleep(0.001)
            except BrokenPipeError:
                return

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()


@contextmanager
def feeding(command: Command) -> Iterator[None]:
    """Writes records as fast as they are read."""
    os.set_blocking(command.stdin, False)
    with in_thread(lambda: os.write(command.stdin, RECORD * 10)):
        yield


@contextmanager
def draining(command: Command) -> Iterator[None]:
    """Reads what it writes."""
    os.set_blocking(command.stdout, False)
    with in_thread(lambda: os.read(command.stdout, 1 << 16)):
        yield
