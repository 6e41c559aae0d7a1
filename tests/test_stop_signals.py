"""How commands end by Ctrl-C, a closed terminal and SIGTERM, each in a terminal of its own. (Stages: test_ends.py.)"""

import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.running import REPOSITORY, environment
from tests.terminal import Terminal

SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
Run = Callable[..., Terminal]

SAVES = """
    # A command that has something to save, which takes a while, and that runs into a library that computes.
    import hashlib, sys, time
    from cluster.command import run_command
    from cluster.stop_signals import STOP

    def main():
        STOP.begun = True
        print("under way", flush=True)
        if sys.argv[1] == "computes":
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
        STOP.wait(600)
        time.sleep(float(sys.argv[1]))
        print("saved", flush=True)
        open(sys.argv[2], "w").close()
        sys.exit(STOP.status)

    run_command(main)
"""
WAITS = """
    # A command that saves nothing.
    import sys, time
    from pathlib import Path
    from cluster.command import run_command

    def main():
        print("under way", flush=True)
        try:
            time.sleep(float(sys.argv[1]))
            print("done", flush=True)
        finally:
            Path(sys.argv[2]).touch()

    run_command(main)
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Starts one of the scripts, or an entry point, in a terminal."""
    started = []

    def start(script: str, *words: str, prefix: tuple[str, ...] = (), under_way: bool = True) -> Terminal:
        file = tmp_path / "script.py"
        if "\n" in script:
            file.write_text(textwrap.dedent(script))
        variables = environment(tmp_path, PYTHONPATH=str(REPOSITORY))
        line = [*prefix, sys.executable, str(file) if "\n" in script else script, *words]
        started.append(Terminal(line, REPOSITORY, variables))
        deadline = time.monotonic() + 60
        while under_way and "under way" not in started[-1].shown:
            assert time.monotonic() < deadline, started[-1].shown
            time.sleep(0.01)
        return started[-1]

    yield start
    for terminal in started:
        terminal.kill()


def lines(terminal: Terminal) -> list[str]:
    """What was shown after the beginning, without the time of day and what the terminal shows of a key."""
    said = terminal.shown.replace("^C", "").partition("under way\n")[2].splitlines()
    return [line[9:] if line[2:3] == ":" else line for line in said]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_saves_and_the_second_ends_at_once(run: Run, tmp_path: Path, number: signal.Signals) -> None:
    once = run(SAVES, "0.2", str(tmp_path / "once"))
    twice = run(SAVES, "600", str(tmp_path / "twice"))
    for terminal in (once, twice):
        terminal.press("\x03") if number == signal.SIGINT else terminal.send(number)
    assert once.wait() == 128 + number
    assert (tmp_path / "once").exists()
    assert lines(once)[1:] == ["saved"]
    assert "the run is saved first; another signal ends it at once" in lines(once)[0]
    time.sleep(1.2)  # two within a second are one
    twice.send(number)
    assert twice.wait() == 128 + number
    assert not (tmp_path / "twice").exists()
    assert len(lines(twice)) == 2
    assert "ended at once" in lines(twice)[1]


def test_signals_that_come_together_are_one(run: Run, tmp_path: Path) -> None:
    """As `timeout`, systemd and a shell that loses its terminal send them."""
    terminal = run(SAVES, "0.3", str(tmp_path / "saved"))
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
        terminal.send(number)
    assert terminal.wait() in (128 + signal.SIGTERM, 128 + signal.SIGHUP)
    assert (tmp_path / "saved").exists()


def test_the_second_signal_ends_a_process_that_hears_none(run: Run, tmp_path: Path) -> None:
    terminal = run(SAVES, "computes", str(tmp_path / "saved"))
    terminal.press("\x03")
    time.sleep(1.2)
    terminal.press("\x03")
    assert terminal.wait() == 130


def test_a_run_whose_terminal_is_closed_saves_though_nothing_can_be_shown(run: Run, tmp_path: Path) -> None:
    terminal = run(SAVES, "0.2", str(tmp_path / "saved"))
    terminal.close()
    assert terminal.wait() == 129
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_command_that_saves_nothing_ends_with_one_line_and_closes_what_is_open(
    run: Run, tmp_path: Path, number: signal.Signals
) -> None:
    terminal = run(WAITS, "600", str(tmp_path / "closed"))
    terminal.press("\x03") if number == signal.SIGINT else terminal.send(number)
    assert terminal.wait() == 128 + number
    assert len(lines(terminal)) == 1, terminal.shown
    assert lines(terminal)[0].startswith("stopped by ")
    assert (tmp_path / "closed").exists()


def test_nohup_keeps_a_command_running(run: Run, tmp_path: Path) -> None:
    terminal = run(WAITS, "2", str(tmp_path / "closed"), prefix=("sh", "-c", 'trap "" HUP; exec "$@"', "sh"))
    terminal.send(signal.SIGHUP)
    assert terminal.wait() == 0
    assert lines(terminal) == ["done"]


def test_a_command_that_ends_after_its_terminal_ends_well(run: Run, tmp_path: Path) -> None:
    """One that SIGHUP does not reach, or that ignores it, has nowhere to print its result."""
    terminal = run(WAITS, "1", str(tmp_path / "closed"), prefix=("sh", "-c", 'trap "" HUP; exec "$@"', "sh"))
    terminal.close()
    assert terminal.wait() == 0


@pytest.mark.parametrize("script", ["pipeline/evaluate.py", "data_prep/verify.py", "cluster/torchrun.py"])
def test_ctrl_c_while_a_command_imports_its_libraries_is_one_line(run: Run, script: str) -> None:
    for _ in range(10):
        terminal = run(script, "one", "two", under_way=False)
        process = Path(f"/proc/{terminal.pid}")
        deadline = time.monotonic() + 60
        # In the midst of the imports; before it is the command, the process is a copy of this one.
        while (
            script.encode() not in (process / "cmdline").read_bytes() or "numpy" not in (process / "maps").read_text()
        ):
            assert time.monotonic() < deadline, terminal.shown
        terminal.press("\x03")
        status = terminal.wait()
        if not (status == 2 and "\nerror" in terminal.shown.replace("^C", "\n")):
            break  # on a busy machine the command may have come to its refusal before it is looked at
    assert status == 130, terminal.shown
    assert "Traceback" not in terminal.shown
    assert terminal.shown.count("\n") == 1


HANDS_ON = """
    import subprocess, sys
    from cluster.command import run_command
    from cluster.stop_signals import hand_on_to_children

    def main():
        hand_on_to_children()
        sys.exit(subprocess.run([sys.executable, *sys.argv[1:]], process_group=0).returncode)

    run_command(main)
"""


@pytest.mark.parametrize("heeds", [True, False])
def test_a_command_hands_signals_on_to_the_one_that_it_waits_for(run: Run, tmp_path: Path, heeds: bool) -> None:
    child = tmp_path / "child.py"
    child.write_text(textwrap.dedent(SAVES))
    terminal = run(HANDS_ON, str(child), "0.2" if heeds else "computes", str(tmp_path / "saved"))
    terminal.press("\x03")
    if not heeds:
        time.sleep(1.2)
        terminal.press("\x03")
    assert terminal.wait() == 130
    assert (tmp_path / "saved").exists() == heeds
    assert len(lines(terminal)) == (2 if heeds else 1), terminal.shown
