"""Ctrl-C, a closed terminal, SIGTERM and run.stop_after, under Ray and torchrun: saved, and gone on with.

What all commands have in common is in test_stop_signals.py.
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.corpora import image_folder, make_corpus
from tests.running import REPOSITORY, environment, losses, tiny, torchrun_command
from tests.terminal import Terminal
from tests.watched_run import command_line, committed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ends")
    return make_corpus(image_folder(root / "images", classes=3, images=20), root / "corpus").path


class Stage:
    """A stage of two ranks that goes on for ever, in one terminal after the other."""

    def __init__(self, home: Path, corpus: Path, launcher: str) -> None:
        self.home, self.launcher, self.folder = home, launcher, home / "runs" / "a"
        ranks = "2" if launcher == "ray" else "null"
        self.words = [*tiny(1_000_000, 500_000), f"data.corpus={corpus}", "run.name=a", f"run.workers={ranks}"]
        self.terminals: list[Terminal] = []

    def start(self, *overrides: str) -> Terminal:
        words = (*self.words, *overrides)
        line = [*words] if self.launcher == "ray" else ["cluster/torchrun.py", *torchrun_command(2, words)[3:]]
        self.terminals.append(Terminal([sys.executable, *line], REPOSITORY, environment(self.home)))
        return self.terminals[-1]

    def under_way(self, *overrides: str) -> Terminal:
        """Started, with some steps taken."""
        terminal, before = self.start(*overrides), self.last_step()
        wait_for(lambda: self.last_step() >= before + 20, terminal)
        time.sleep(1.5)  # until the driver has heard of the first step
        return terminal

    def last_step(self) -> int:
        return max(losses(self.folder / "metrics.jsonl"), default=0)

    def saved(self) -> int:
        """The step of the newest checkpoint."""
        return max(committed(self.folder / "checkpoints"), default=0)

    def rank(self) -> psutil.Process:
        """Rank 1."""
        family = psutil.Process(self.terminals[-1].pid).children(recursive=True)
        name = "RayTrainWorker" if self.launcher == "ray" else "pretrain.py"
        return next(p for p in family if name in command_line(p) and p.environ().get("RANK", "1") == "1")


def wait_for(what: Callable[[], bool], terminal: Terminal, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert terminal.poll() is None, terminal.shown
        assert time.monotonic() < deadline, terminal.shown
        time.sleep(0.05)


@pytest.fixture
def stage(request: pytest.FixtureRequest, tmp_path: Path, corpus: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path, corpus, request.param)
    yield stage
    for terminal in stage.terminals:
        terminal.kill()


@pytest.mark.parametrize("stage", ["ray", "torchrun"], indirect=True)
def test_a_stage_in_a_terminal_saves_whatever_ends_it_and_goes_on(stage: Stage) -> None:
    ways: tuple[tuple[int, Callable[[Terminal], None]], ...] = (
        (130, lambda terminal: terminal.press("\x03")),
        (143, lambda terminal: terminal.send(signal.SIGTERM)),
        (129, Terminal.close),
    )
    for status, ends in ways:
        began = time.monotonic()
        terminal = stage.under_way()
        ends(terminal)
        assert terminal.wait(120) == status, terminal.shown
        assert stage.saved() == stage.last_step(), terminal.shown
        if status != 129:  # or there is nowhere to say it
            assert terminal.shown.count("the run is saved first") == 1, terminal.shown
            assert f"stopped at step {stage.saved()} of" in terminal.shown
        assert "Traceback" not in terminal.shown.partition("told to stop")[2]
    start_takes = time.monotonic() - began

    # A rank that hangs holds up the save; a second signal ends the command all the same.
    saved = stage.saved()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        terminal = stage.under_way()
        rank = stage.rank()
        rank.suspend()
        for pause in (1.5, 0):
            terminal.press("\x03") if number == signal.SIGINT else terminal.send(number)
            time.sleep(pause)
        assert terminal.wait(60) == 128 + number, terminal.shown
        assert "Traceback" not in terminal.shown.partition("ended at once")[2]
        assert stage.saved() == saved
        psutil.wait_procs([rank], timeout=60)
        assert not rank.is_running()

    # The time that a queue gives.
    limit = round(2 * start_takes + 20)
    began = time.monotonic()
    terminal = stage.start(f"run.stop_after={limit} s")
    assert terminal.wait(600) == 75, terminal.shown
    assert time.monotonic() - began < limit
    assert stage.saved() == stage.last_step() > saved
    assert "told to stop because run.stop_after = " in terminal.shown
    assert "Traceback" not in terminal.shown.partition("told to stop")[2]
