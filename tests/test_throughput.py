"""What the log line says of the time between two lines."""

import time
from contextlib import contextmanager

import pytest

from pipeline.throughput import Meter, log_line


@contextmanager
def timed(seconds):
    began = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - began)


def test_all_that_training_waits_for_at_a_save_is_stall_and_none_of_it_lowers_the_rate():
    whole: list[float] = []
    saving: list[float] = []
    scoring: list[float] = []
    with timed(whole):
        meter = Meter(100, 10, 1.0, None, 1)
        time.sleep(0.2)
        with timed(saving), meter.stalled():
            time.sleep(0.3)
        with timed(scoring), meter.paused():
            time.sleep(0.2)
        values = meter.measure(1)
    assert values["checkpoint_stall"] == pytest.approx(saving[0] / whole[0], rel=0.05)
    assert values["images_per_second"] == pytest.approx(10 / (whole[0] - saving[0] - scoring[0]), rel=0.1)
    line = log_line(1, 100, {**values, "loss": 1.0, "learning_rate": 1.0, "gradient_norm": 1.0}, 1.0)
    assert f"checkpoint stall {100 * values['checkpoint_stall']:.1f} %" in line
    assert meter.measure(2)["checkpoint_stall"] == 0


def test_the_overall_rate_counts_all_of_the_time_over_restarts():
    whole: list[float] = []
    with timed(whole):
        meter = Meter(100, 10, 1.0, None, 1)
        with meter.stalled():
            time.sleep(0.2)
        meter.measure(1)
        with meter.paused():
            time.sleep(0.1)
        first = meter.total(2, None)
    assert first["images"] == 20
    assert 0.3 <= first["seconds"] <= whole[0]
    second = Meter(98, 10, 1.0, None, 1).total(3, first)
    assert second["images"] == 50
    assert second["seconds"] > first["seconds"]
