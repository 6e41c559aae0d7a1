"""What all ranks must decide alike, agreed on without making a step wait.

Each step sends a few numbers into a reduction that runs beside it and is read at the next step. So a wish that one
rank has at step s is known to all at the beginning of step s + 1, and none acts on it alone.
"""

import datetime
from collections.abc import Sequence

import torch
import torch.distributed as dist

from pipeline.workers import Worker


class Consensus:
    """Sums of numbers over the ranks, one step late. Every rank must make it, and make the same calls.

    Args:
        names: what is summed.
        timeout_s: for the ranks that are waited for.
    """

    def __init__(self, names: Sequence[str], worker: Worker, timeout_s: int) -> None:
        self.names = tuple(names)
        # A group of its own, on the CPU: it neither waits behind gradients nor for a device.
        timeout = datetime.timedelta(seconds=timeout_s)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if worker.world_size > 1 else None
        self._sent: torch.Tensor | None = None
        self._work: dist.Work | None = None

    def exchange(self, **mine: float) -> dict[str, float] | None:
        """Send this rank's numbers (0 for those that are not given); returns the sums of what was sent before.

        Returns:
            None where nothing was, or where its sums were asked for already.
        """
        before = self.settle()
        assert mine.keys() <= set(self.names), mine
        self._sent = torch.tensor([float(mine.get(name, 0.0)) for name in self.names], dtype=torch.float64)
        if self._group is not None:
            self._work = dist.all_reduce(self._sent, group=self._group, async_op=True)
        return before

    def settle(self) -> dict[str, float] | None:
        """The sums of what was sent last, as soon as every rank has sent it: for rare moments, such as a save."""
        if self._sent is None:
            return None
        if self._work is not None:
            self._work.wait()
        sums = dict(zip(self.names, self._sent.tolist(), strict=True))
        self._sent = self._work = None
        return sums
