"""How the ranks are started again, where it is not a rank that failed. (Ranks and hosts that die: test_faults.py.)"""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from pipeline.crew import Terms
from pipeline.launch import run_ranks
from pipeline.stopping import Control


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts back the signals' handlers that a command and Ray replace."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def leave_word(argument: str, control: Control) -> bool:
    """A target: a file for every rank that ran, with the attempt."""
    control.begin()
    Path(argument, str(ray.train.get_context().get_world_rank())).write_text(str(control.attempt))
    return True


@pytest.mark.slow
@pytest.mark.usefixtures("handlers")
def test_room_that_another_job_takes_before_the_ranks_start_costs_one_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: Callable[[], str]
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
    taken: list[Any] = []

    def take_all(ranks: int) -> None:
        """Asked when room has been found: now the other job comes, once."""
        if not taken:
            taken.append(placement_group([{"CPU": ray.available_resources()["CPU"]}]))
            assert taken[0].wait(60)

    def give_back() -> str:
        """Asked between starts: the other job ends."""
        if taken:
            remove_placement_group(taken[0])
        return ""

    terms = Terms((1, 2), 1, max_failures=1, wait_s=120)
    run_ranks(leave_word, str(tmp_path), name="taken", terms=terms, check=take_all, progress=give_back)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "1", "1": "1"}
    assert (
        "crash 1 of at most 1 without a new checkpoint: the room for 2 rank(s) was taken before they started; "
        "starting the ranks again"
    ) in messages()
