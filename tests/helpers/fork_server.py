"""Command lines in processes that are forked from one which has imported the package: a start costs no import.

A forked process leads a session of its own, so that a test can kill it with all that it has started.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path


class ForkServer:
    """The process that forks, as a context manager."""

    def __enter__(self) -> ForkServer:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._started: set[int] = set()
        self._server = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._started:  # of a test that has failed
            with suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
        self._server.kill()
        self._server.communicate()

    def start_ranks(self, folder: Path, arguments: Sequence[object], log: Path, n: int) -> list[int]:
        """Starts so many processes of one run, as a cluster does; each prints to a log of its own, ``LOG-0``, ..."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"NODE_RANK": "0", "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        arguments = [*arguments, "--trainer.strategy", "ddp", "--trainer.devices", n]
        return [
            self.start(folder, arguments, log.with_name(f"{log.name}-{rank}"), LOCAL_RANK=str(rank), **shared)
            for rank in range(n)
        ]

    def start(self, folder: Path, arguments: Sequence[object], log: Path, **environment: str) -> int:
        """Starts ``metatpt ARGUMENTS`` in a working folder.

        Args:
            folder: The working folder, from which a user's own method is imported too.
            arguments: The arguments.
            log: Takes what is printed.
            **environment: Variables of its environment, more than there are.

        Returns:
            The process's id.
        """
        process = self._ask([str(folder), [str(each) for each in arguments], str(log), environment])
        assert process is not None
        self._started.add(process)
        return process

    def status(self, process: int, seconds: float) -> int:
        """The exit status of a process that ends within so many seconds; of a killed one minus the signal."""
        limit = time.monotonic() + seconds
        while (status := self._ask(process)) is None:
            if time.monotonic() > limit:
                raise TimeoutError(f"Process {process} still runs after {seconds} seconds.")
            time.sleep(0.02)
        self._started.remove(process)
        return status

    def _ask(self, question: object) -> int | None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(question), file=self._server.stdin, flush=True)
        answer: int | None = json.loads(self._server.stdout.readline())
        return answer


def _serve() -> None:
    from metatpt.cli import main

    for line in sys.stdin:
        question = json.loads(line)
        if isinstance(question, int):
            process, status = os.waitpid(question, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if process else None
        else:
            answer = os.fork()
            if answer == 0:
                _become(main, *question)
        print(json.dumps(answer), flush=True)


def _become(
    main: Callable[[list[str]], int], folder: str, arguments: list[str], log: str, environment: dict[str, str]
) -> None:
    """Runs a command in place of the forked process."""
    from lightning.pytorch.utilities import rank_zero_only

    status = 70
    try:
        os.setsid()
        os.chdir(folder)
        os.environ.update(environment)
        rank_zero_only.rank = int(environment.get("LOCAL_RANK", "0"))  # which Lightning reads when it is imported
        sys.path[0] = ""
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output, stream.fileno())
        os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
        status = main(arguments)
    finally:  # a fork has nothing to clean up, and no caller to return to
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
