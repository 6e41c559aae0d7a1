"""What a person reads while a command works: every line says something, and nothing says what is not known."""

import io
import json
import logging
import subprocess
import sys
import time

import pytest

from cluster import worker_output
from cluster.command import LogFormatter, Progress, in_figures
from cluster.waiting import Waiting
from pipeline.throughput import Meter
from tests.running import REPOSITORY


def test_a_warning_says_that_it_is_one():
    def line(level):
        return LogFormatter().format(logging.LogRecord("vitforge", level, "", 0, "%d images", (3,), None))

    assert line(logging.INFO)[9:] == "3 images"
    assert line(logging.WARNING)[9:] == "warning: 3 images"
    assert line(logging.ERROR)[9:] == "error: 3 images"


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (100.0, "100"), (99.96, "100"), (9.95, "10"), (7.26, "7.3"), (0.041, "0.041")]
)
def test_numbers_are_written_without_exponents(number, text):
    assert in_figures(number) == text


def test_no_time_left_is_shown_before_as_many_pieces_again_are_done_as_are_worked_on_at_a_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(1000, "images", "sharding", at_once=2)
    for seconds, seen in ((30, None), (0.5, None), (5, None), (5, 960 * 10 / 20), (5, 950 * 15 / 30)):
        now[0] += seconds
        progress.update(10)
        left = progress.seconds_left
        assert (left is None) == (seen is None), progress.line()
        if seen is not None:
            assert left == pytest.approx(seen)  # the half minute in which two processes started is not in it
            assert " left" in progress.line()


def test_the_first_step_says_nothing_of_the_time_left():
    meter = Meter(20, 10, 1.0, None, 1)
    meter.measure(1)
    assert meter.seconds_left(1) is None
    meter.measure(2)
    assert meter.seconds_left(2) is not None


def test_lines_of_ranks_are_shown_as_they_are_and_colors_on_terminals_alone(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    data = {
        "lines": ["09:21:56 step 1/20, loss 2.3", "Segmentation fault \x1b[31mhere\x1b[0m", "09:21:57 step 2/20"],
        "is_err": True, "pid": 7, "ip": "10.0.0.1", "localhost": "10.0.0.1", "actor_name": "RayTrainWorker",
    }  # fmt: skip
    file, terminal = io.StringIO(), Terminal()
    for stream in (file, terminal):
        monkeypatch.setattr(sys, "stderr", stream)
        worker_output.show(data)
    assert (  # a Ray of other tests may say something, too
        "09:21:56 step 1/20, loss 2.3\n(RayTrainWorker pid=7) Segmentation fault here\n09:21:57 step 2/20\n"
    ) in file.getvalue()
    assert "\x1b[" in terminal.getvalue()


def test_a_long_wait_says_what_for(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vitforge"), "propagate", True)
    with caplog.at_level(logging.INFO, "vitforge"), Waiting("Ray to start", every=0.05) as waiting:
        time.sleep(0.2)
        waiting.what = "2 ranks to start"
        time.sleep(0.2)
    said = [record.getMessage() for record in caplog.records]
    assert "waiting for Ray to start (0 s)" in said
    assert "waiting for 2 ranks to start (0 s)" in said
    time.sleep(0.1)
    assert len(caplog.records) == len(said)


def test_dali_says_nothing_of_the_old_names_that_it_uses_itself():
    settings = {
        "corpus": "none", "image_size": 32, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "rules": 1,
        "augment": {"trivialaugment": True},
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.decoder_choice", "cpu", json.dumps(settings)],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
