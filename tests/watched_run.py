"""A run that goes on while a test watches its files, kills parts of it and starts it again."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from tests.running import REPOSITORY, environment

POLL_S = 0.01


class Place(Protocol):
    """Where the driver of a run is started: this machine, or the first of two hosts."""

    def start(self, *words: str, log: Path, **extra: str) -> "subprocess.Popen[bytes]":
        """Start an entry point under Python."""

    def ranks(self) -> list[psutil.Process]:
        """The processes that train."""


class ThisMachine:
    """The driver starts a Ray cluster of its own, as on a laptop."""

    def __init__(self, home: Path, **extra: str) -> None:
        self.variables = environment(home, **extra)
        self._drivers: list[subprocess.Popen[bytes]] = []
        self._known: dict[int, psutil.Process] = {}

    def start(self, *words: str, log: Path, **extra: str) -> "subprocess.Popen[bytes]":
        """Start an entry point. What a killed driver left behind has to end by itself."""
        self.family()
        with log.open("ab") as file:
            driver = subprocess.Popen(
                [sys.executable, *words], cwd=REPOSITORY, env={**self.variables, **extra}, stdout=file, stderr=file
            )
        self._drivers.append(driver)
        return driver

    def family(self) -> list[psutil.Process]:
        """Every live process that stems from our drivers, also of those that have been killed."""
        for process in self._children():
            self._known[process.pid] = process
        for process in list(self._known.values()):
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                del self._known[process.pid]
        return list(self._known.values())

    def _children(self) -> list[psutil.Process]:
        """What stems from the driver that was started last."""
        if not self._drivers or self._drivers[-1].poll() is not None:
            return []
        try:
            return psutil.Process(self._drivers[-1].pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def orphans(self) -> list[psutil.Process]:
        """Live processes of drivers before the last one."""
        now = {process.pid for process in self._children()}
        return [process for process in self.family() if process.pid not in now]

    def ranks(self) -> list[psutil.Process]:
        """The processes that train."""
        return [process for process in self._children() if "RayTrainWorker" in command_line(process)]

    def end(self) -> None:
        """Kill what is left of the drivers and of what they started."""
        family = self.family()
        for driver in self._drivers:
            if driver.poll() is None:
                driver.kill()
            driver.wait()
        for process in family:
            if process.is_running():
                process.kill()
        psutil.wait_procs(family, timeout=20)


def command_line(process: psutil.Process) -> str:
    """What `ps` would show; empty for a process that has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@dataclass
class WatchedRun:
    """One run folder, and the command that works on it."""

    place: Place
    folder: Path
    """RUN."""
    words: list[str]
    log: Path
    driver: "subprocess.Popen[bytes] | None" = None
    lives: int = 0
    """How often the command was started."""
    _log_from: int = field(default=0, repr=False)
    every_resumed: list[int] = field(default_factory=list)
    """Steps that lives of the run resumed from, of every life, as far as `resumed` was asked."""
    _read_to: int = field(default=0, repr=False)
    _resumed: list[tuple[str, int]] = field(default_factory=list, repr=False)
    _found: bool = field(default=False, repr=False)

    def start(self, *overrides: str) -> None:
        """The same command again."""
        self._log_from = self.log.stat().st_size if self.log.exists() else 0
        self._read_to, self._resumed, self._found = self._log_from, [], self.newest() > 0
        self.driver = self.place.start(*self.words, *overrides, log=self.log)
        self.lives += 1

    def alive(self) -> bool:
        """Whether the driver is there."""
        return self.driver is not None and self.driver.poll() is None

    def last_step(self) -> int:
        """The last step in the record of metrics; 0 before the first."""
        steps = [row["step"] for row in tail(self.folder / "metrics.jsonl") if "loss" in row]
        return steps[-1] if steps else 0

    def committed(self) -> list[int]:
        """Steps of the checkpoints that count."""
        return committed(self.folder / "checkpoints")

    def uploading(self) -> bool:
        """Whether parts of a checkpoint are in the run's folder that does not count yet."""
        return any(not (path / "manifest.json").exists() for path in (self.folder / "checkpoints").glob("step-*"))

    def newest(self) -> int:
        """Step of the newest checkpoint that counts; 0 where there is none."""
        return max(self.committed(), default=0)

    def resumed(self, since: str = "") -> list[int]:
        """The steps that this life of the driver, and the attempts within it, say they resumed from, in that order.

        Args:
            since: time of the day, HH:MM:SS, from which on. Ray brings what another host says late, and in any order.
        """
        with self.log.open("rb") as file:
            file.seek(self._read_to)
            whole, _, _ = file.read().rpartition(b"\n")
        if whole:
            self._read_to += len(whole) + 1
            lines = re.findall(r"(\d\d:\d\d:\d\d) resumed from \S*step-(\d+)", whole.decode(errors="replace"))
            found = [(when, int(step)) for when, step in lines]
            self._resumed = sorted([*self._resumed, *found], key=lambda said: said[0])
            self.every_resumed += [step for _, step in found]
        return [step for when, step in self._resumed if when >= since]

    def output(self) -> str:
        """What this life of the driver has said."""
        with self.log.open("rb") as file:
            file.seek(self._log_from)
            return file.read().decode(errors="replace")

    def wait(self, what: str, reached: Callable[[], Any], timeout: float = 900, poll: float = POLL_S) -> Any:
        """Until `reached()` is true, asked every `poll` seconds; gives what it returned.

        Raises:
            AssertionError: it took longer, or the driver ended first.
        """
        deadline = time.monotonic() + timeout
        while not (value := reached()):
            assert self.alive(), f"the run ended while waiting for {what}: {self.output()[-3000:]}"
            assert time.monotonic() < deadline, f"no {what} in {timeout:.0f} s: {self.output()[-3000:]}"
            time.sleep(poll)
        return value

    def wait_for_steps(self, count: int, timeout: float = 900) -> None:
        """Until this life of the driver has resumed, if it has what from, and `count` more steps are recorded."""
        if self._found:
            self.wait("the resume", self.resumed, timeout)
        goal = self.last_step() + count
        self.wait(f"step {goal}", lambda: self.last_step() >= goal, timeout)


def in_a_second() -> str:
    """Time of the day from which on a resume is one after what happens now: none takes less than a second."""
    return time.strftime("%H:%M:%S", time.localtime(time.time() + 1))


def tail(path: Path, length: int = 2048) -> list[dict[str, Any]]:
    """The last rows of a JSON-lines file, without one that is being written."""
    try:
        with path.open("rb") as file:
            start = max(os.fstat(file.fileno()).st_size - length, 0)
            file.seek(start)
            content = file.read()
    except FileNotFoundError:
        return []
    lines = content.split(b"\n")[1 if start else 0 : -1]
    return [json.loads(line) for line in lines if line]


def committed(folder: Path) -> list[int]:
    """Steps of the checkpoints of a local run that count."""
    return sorted(int(path.parent.name.split("-")[1]) for path in folder.glob("step-*/manifest.json"))
