"""What an outside watcher can read of a run: a file in its folder, and metrics in Prometheus' text through Ray.

The file changes every few seconds as long as rank 0 is alive, whatever the step is doing.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

from cluster.command import log
from cluster.folders import Folder
from pipeline.stopping import Every
from pipeline.workers import node

FILE = "heartbeat.json"
_LOCAL_S, _REMOTE_S = 5.0, 30.0
"""Seconds between writes: on an object store each of them costs a request."""
_GAUGES = {
    "step": "Optimizer steps taken",
    "loss": "Training loss of the last logged step",
    "images_per_second": "Images a second over all ranks",
    "checkpoint_step": "Step of the newest committed checkpoint",
    "checkpoint_age_seconds": "Seconds since the newest checkpoint was committed",
    "bad_samples": "Samples that could not be read and were replaced",
    "restarts": "Starts of the ranks by this command, after the first",
    "ranks": "Ranks of the run",
}


class Heartbeat:
    """The heartbeat of a run, from rank 0.

    Args:
        folder: the run's.
        run: name of the run.
        fixed: what does not change while these ranks run.

    Attributes:
        commits: gives step and time (Unix) of the checkpoint that was committed last.
    """

    def __init__(self, folder: Folder, run: str, **fixed: Any) -> None:
        self._folder, self._run = folder, run
        self._values: dict[str, Any] = {"state": "starting", "step": 0, **fixed}
        self.commits: Callable[[], tuple[int, float] | None] = lambda: None
        self._gauges = _ray_gauges()
        self._thread = Every(_LOCAL_S if folder.local else _REMOTE_S, self._write, "heartbeat")

    def update(self, **values: Any) -> None:
        """Change some of what is shown; written with the next beat."""
        self._values = {**self._values, **values}

    def close(self) -> None:
        """Write a last time."""
        self._thread.close()
        try:
            self._write()
        except (OSError, ValueError) as error:
            log.warning("the last heartbeat could not be written (%s)", error)

    def _write(self) -> None:
        now = time.time()
        values = dict(self._values)
        if committed := self.commits():
            values |= {"checkpoint_step": committed[0], "checkpoint_age_seconds": now - committed[1]}
        for name, gauge in self._gauges.items():
            if values.get(name) is not None:
                gauge.set(float(values[name]), tags={"run": self._run})
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
        self._folder.write_json(FILE, {"time": stamp, "unix_time": now, "run": self._run, "host": node(), **values})


def _ray_gauges() -> dict[str, Any]:
    """Ray's gauges vitforge_*; none where Ray does not run."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return {}
    from ray.util.metrics import Gauge

    return {name: Gauge(f"vitforge_{name}", description=text, tag_keys=("run",)) for name, text in _GAUGES.items()}
