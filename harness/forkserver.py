"""A server that has imported torch, but touched no device, and forks the workers of a runner from its second run on.

    python -m dyno.forkserver MODULE...    with the link to the runner as 0

torch's import is most of a short run: from the start of a worker to its first step of model=nano took 11.2 s started and
5.2 s forked, on two busy cores (medians of 5; at best 5.8 and 2.9). Each request brings the files of a keeper, which the
server forks; the keeper forks the ranks, so that every rank is a fresh process with nothing behind it but imports. The
server was born with the environment that the ranks get: what a library reads while it is imported is as in a plain start.
It refuses its service when it has a thread besides the first, because threads and their locks do not survive a fork. It
ends with its runner.

A fork shares its parent's memory but not the mapping of its libraries' pages, and would count as smaller than a started
process by what the imports read of them (66 MB of 222 after torch's): each rank maps those pages again.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import importlib
import itertools
import mmap
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading

from dyno.keeper import Rank, keep

FORKED = "DYNO_FORKED"  # set in a worker that was forked
QUIET_IMPORTS = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # imports ask whether there is a GPU: NVML answers, not CUDA
BORN_S = 120.0  # the longest that the imports may take
FORK_S = 10.0
MADV_POPULATE_READ = 22  # Linux 5.14; older kernels refuse it, and memory figures then lack the pages


class ForkServer:
    """The runner's end. The server starts at the first request, and anew when it has died or the environment changed.

    Args:
        modules: what it imports.
    """

    def __init__(self, modules: tuple[str, ...]):
        self.modules = modules
        self.process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._born: tuple[dict[str, str], str] | None = None
        self._lock = threading.Lock()

    def fork(self, files: list[int], environment: dict[str, str], patience_s: float) -> None:
        """Have a keeper forked that gets `files` as 0, 1, 2, ...

        Raises:
            ConnectionError: the server cannot be started, has died, or is late; plain starts are what is left.
        """
        with self._lock:
            done = False
            try:
                if self._born != (environment, os.getcwd()):
                    self.close()
                    self._start(environment, min(patience_s, BORN_S))
                if self._link is not None:  # one that failed is not tried again: it would cost a start each time
                    self._link.settimeout(FORK_S)
                    socket.send_fds(self._link, [b"f"], files)
                    done = self._link.recv(1) == b"f"
            except OSError as error:
                raise ConnectionError(f"no fork server: {error}") from error
            finally:
                if not done:
                    self.close()
            if not done:
                raise ConnectionError("no fork server")

    def _start(self, environment: dict[str, str], patience_s: float) -> None:
        self._born = environment, os.getcwd()
        self._link, theirs = socket.socketpair()
        command = [sys.executable, "-m", "dyno.forkserver", *self.modules]
        with theirs:
            self.process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env=environment | QUIET_IMPORTS, start_new_session=True,
            )  # fmt: skip
        self._link.settimeout(patience_s)
        if self._link.recv(1) != b"r":
            raise ConnectionError("it ended while it was born")

    def close(self) -> None:
        """End the server. The runs that it has begun go on: their keepers have links of their own."""
        if self._link is not None:
            self._link.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = self._link = None


def main(modules: list[str]) -> None:
    for name in modules:
        importlib.import_module(name)
    if os.fork() == 0:  # numpy's OpenBLAS starts its threads with the import, and takes them down before a fork
        os._exit(int("torch" in sys.modules and sys.modules["torch"].cuda._is_in_bad_fork()))
    if os.wait()[1] != 0:  # an import has touched the GPU's driver: no fork could use it
        return
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers report to the runner
    link = socket.socket(fileno=0)
    if threads() != 1:
        return
    pages = library_pages()
    link.sendall(b"r")
    while True:
        message, files, *_ = socket.recv_fds(link, 1, 64)
        if not message:
            return
        if os.fork() == 0:
            break
        link.sendall(b"f")
        for file in files:
            os.close(file)
    os.setsid()
    link.detach()
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
        os.close(file)
    rank = keep(fork)
    if rank is None:
        os._exit(0)
    libc = ctypes.CDLL(None)
    for address, size in pages:
        libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), MADV_POPULATE_READ)
    run(rank)


def fork(rank: Rank) -> int:
    """Start a rank as a fork of this process."""
    pid = os.fork()
    with contextlib.suppress(OSError):  # whoever comes second finds it done, or the other one ended
        os.setpgid(pid, rank.group or pid)
    return pid


def run(rank: Rank) -> None:
    """Be the interpreter that a plain start of `python -m MODULE ARGUMENT...` would have been."""
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)  # in the place of the keeper's link
    os.environ.clear()
    os.environ.update(rank.environment, **{FORKED: "1"})
    # Python's `random` seeds itself anew after a fork; these do it with their import, which all ranks have in common.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()
    _, _, module, *arguments = rank.command
    sys.argv[:] = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def library_pages() -> list[tuple[int, int]]:
    """The (address, bytes) of what this process has in memory of the files that it maps."""
    found = []
    with open("/proc/self/maps") as maps, open("/proc/self/pagemap", "rb") as pagemap:
        for line in maps:
            span, _, _, _, inode, *_ = line.split()
            if inode == "0":
                continue
            start, end = (int(bound, 16) for bound in span.split("-"))
            pagemap.seek(8 * start // mmap.PAGESIZE)
            present = [entry >> 63 for entry in array.array("Q", pagemap.read(8 * (end - start) // mmap.PAGESIZE))]
            for is_present, run in itertools.groupby(enumerate(present), key=lambda page: page[1]):
                if is_present:
                    pages = [number for number, _ in run]
                    found.append((start + pages[0] * mmap.PAGESIZE, len(pages) * mmap.PAGESIZE))
    return found


def threads() -> int:
    """The threads of this process, native ones as well."""
    return len(os.listdir("/proc/self/task"))


if __name__ == "__main__":
    main(sys.argv[1:])
