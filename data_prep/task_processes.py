"""Does the tasks of a small job in processes of this machine: they start within a second, where Ray takes ten.

Each takes one task after the other. One that ends, because a decoder crashes on an image, takes along its own task and
nothing else, as a worker of Ray does. They end with the process that started them.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext, suppress
from typing import IO, Any

import cloudpickle

from cluster.command import set_up_logging
from data_prep.decoder_process import guarded

_LENGTH = 8
"""Bytes of the number before each message."""


class TaskProcessEndedError(Exception):
    """The processes that a task was given to ended; the message says how."""


class TaskProcesses:
    """Some processes of this machine.

    Args:
        function: takes a task; done twice it must do the same.
        count: of the processes, each of which is started when it has something to do.
    """

    def __init__(self, function: Callable[[Any], dict[str, Any]], count: int) -> None:
        self._function = function
        self._threads = ThreadPoolExecutor(count, "vitforge-task")
        self._own = threading.local()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._closed = False

    def start(self, task: Any, tries: int, careful: bool) -> "Future[dict[str, Any]]":
        """Begin a task.

        Args:
            tries: processes that may end on it.
            careful: each image is decoded in a process of its own first (decoder_process.py).
        """
        return self._threads.submit(self._do, cloudpickle.dumps((self._function, task, careful)), tries)

    @staticmethod
    def wait(futures: "list[Future[dict[str, Any]]]", timeout: float | None) -> "list[Future[dict[str, Any]]]":
        """Those that have ended, as soon as there is one; none after `timeout` seconds."""
        return list(wait(futures, timeout, FIRST_COMPLETED).done)

    def close(self) -> None:
        """End the processes at once, whatever they do."""
        self._closed = True
        for process in list(self._processes):
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            _end(process)

    def _do(self, message: bytes, tries: int) -> dict[str, Any]:
        for _ in range(tries):
            process = self._process()
            assert process.stdin is not None
            assert process.stdout is not None
            with suppress(BrokenPipeError):
                _send(process.stdin, message)
            answer = _receive(process.stdout)
            if answer is not None:
                result, error = pickle.loads(answer)
                if error is not None:
                    raise error
                return dict(result)
            process.kill()  # one that has only closed its pipe
            ended = process.wait()
            del self._own.process
            if self._closed:
                break
        name = signal.Signals(-ended).name if -ended in {*signal.Signals} else f"exit status {ended}"
        raise TaskProcessEndedError(name)

    def _process(self) -> "subprocess.Popen[bytes]":
        """The process of this thread."""
        if not hasattr(self._own, "process"):
            self._own.process = subprocess.Popen(
                [sys.executable, "-c", "from data_prep.task_processes import serve; serve()"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                process_group=0,  # a signal of the terminal is for the command, which ends them
            )  # fmt: skip
            self._processes.add(self._own.process)
        process: subprocess.Popen[bytes] = self._own.process
        return process


def serve() -> None:
    """The process: does the tasks that come, until there are no more or who sends them is gone."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    set_up_logging()
    messages: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_read_on, args=(messages,), daemon=True).start()
    while True:
        _send(out, _answer(messages.get()))


def _read_on(messages: "queue.Queue[bytes]") -> None:
    while (message := _receive(sys.stdin.buffer)) is not None:
        messages.put(message)
    os._exit(0)  # in the midst of a task, too: nobody waits for it any more


def _answer(message: bytes) -> bytes:
    try:
        function, task, careful = pickle.loads(message)
        with guarded() if careful else nullcontext():
            return cloudpickle.dumps((function(task), None))
    except Exception as error:  # for the process that waits
        if not isinstance(error, (ValueError, OSError)):
            error.add_note(f"in a process of the job:\n{traceback.format_exc()}")
        return cloudpickle.dumps((None, error))


def _send(pipe: IO[bytes], message: bytes) -> None:
    pipe.write(len(message).to_bytes(_LENGTH, "little"))
    pipe.write(message)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes | None:
    head = pipe.read(_LENGTH)
    size = int.from_bytes(head, "little")
    message = pipe.read(size) if len(head) == _LENGTH else b""
    return message if head and len(message) == size else None


def _end(process: "subprocess.Popen[bytes]") -> None:
    with suppress(BrokenPipeError), process:  # which closes its pipes and waits for its end
        process.kill()
