"""The loss and the gradient under watch: what is not finite, or jumps, stops the run or is rolled back.

Nothing here makes a step wait for the device: a value is looked at when the next step is under way (at once on a
CPU), and all ranks hear of it with the step's exchange (`Consensus`). Nothing is saved before all that was computed
has been looked at.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.command import log
from cluster.folders import Folder
from cluster.marked_folders import temporary_folder
from data_prep.contact_sheet import draw_contact_sheet
from data_prep.mixture import Mixture
from pipeline.config import HealthSettings
from pipeline.workers import Worker, from_all

NAMES = ("nonfinite", "loss", "known")
"""What a rank tells the others of its steps."""
_HISTORY, _LEAST_HISTORY = 200, 20
"""Steps that a spike is measured against."""
_STORED_IMAGES = 64
"""Images that a report keeps at most, of all ranks."""


class NonFiniteError(ValueError):
    """The loss or the gradient became infinite or not a number, or the loss jumped, and the run must not go on."""


@dataclass(frozen=True)
class Taken:
    """A step that this rank took."""

    step: int
    """Steps taken with it."""
    window: int
    """The window of the order that it used."""
    ids: NDArray[np.int64]
    loss: torch.Tensor
    """Mean loss of this rank's images; on its way to the host until `there`."""
    bad: torch.Tensor
    """Not 0 if the gradient of this step, or of one before it, was not finite."""
    there: torch.cuda.Event | None
    """When they have arrived; None on CPUs."""


@dataclass(frozen=True)
class Share:
    """A rank's part of a step that went wrong."""

    rank: int
    step: int
    window: int
    ids: list[int]
    loss: float


@dataclass(frozen=True)
class Trouble:
    """A step that went wrong. All ranks have the same."""

    step: int
    window: int
    what: str
    spike: bool
    shares: list[Share]
    """The parts of the ranks that it is about."""


class Health:
    """Watches the steps of one rank; all ranks make the same calls.

    Args:
        usual: losses that a checkpoint has of the steps before it, as `usual` gave them then.
    """

    def __init__(self, settings: HealthSettings, worker: Worker, usual: Iterable[float] = ()) -> None:
        self.settings, self.worker = settings, worker
        self.begin_again(usual)

    def begin_again(self, usual: Iterable[float]) -> None:
        """The steps since the last checkpoint were taken back: what they did is no longer looked at."""
        self._losses: deque[float] = deque(usual, maxlen=_HISTORY)
        self._waiting: deque[Taken] = deque()
        self._told: deque[list[Taken]] = deque()

    @property
    def usual(self) -> list[float]:
        """The losses that a spike is measured against, oldest first: a restart needs them to see the same spikes."""
        return list(self._losses)

    def took(self, step: int, window: int, ids: NDArray[np.int64], loss: torch.Tensor, bad: torch.Tensor) -> None:
        """Note a step.

        Args:
            loss: of this rank's images, scalar on the device.
            bad: scalar on the device, not 0 if a gradient was not finite.
        """
        loss, bad = loss.detach(), bad.detach()
        there = None
        if self.worker.gpu:
            loss, bad = (torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, True) for x in (loss, bad))
            there = torch.cuda.Event()
            there.record()
        self._waiting.append(Taken(step, window, ids, loss, bad, there))

    def tell(self, everything: bool = False) -> dict[str, float]:
        """This rank's numbers for the exchange, of the steps whose values are here.

        Args:
            everything: wait for those that are on their way.
        """
        seen: list[Taken] = []
        while self._waiting and (everything or not self.worker.gpu or len(self._waiting) > 1):
            seen.append(self._waiting.popleft())
            if (there := seen[-1].there) is not None:
                there.synchronize()
        self._told.append(seen)
        good = [taken for taken in seen if _is_finite(taken)]
        loss = sum(float(taken.loss) for taken in good)
        return {"nonfinite": len(seen) - len(good), "loss": loss, "known": len(good)}

    def judge(self, sums: dict[str, float]) -> Trouble | None:
        """What the sums of all ranks say of the steps that `tell` told of, oldest first."""
        told = self._told.popleft()
        if sums["nonfinite"]:
            shares = self._shares([taken for taken in told if not _is_finite(taken)])
            lost = [share for share in shares if not math.isfinite(share.loss)]
            if lost:
                what = f"the loss became {lost[0].loss} on rank {', '.join(str(share.rank) for share in lost)}"
            else:
                what = "the gradient was not finite"
            return Trouble(shares[0].step, shares[0].window, what, False, lost or shares)
        if not self.settings.spike_factor or not sums["known"]:
            return None
        loss = sums["loss"] / sums["known"]
        if len(self._losses) >= _LEAST_HISTORY and loss > self.settings.spike_factor * statistics.median(self._losses):
            what = f"the loss jumped to {loss:.4g}, {loss / statistics.median(self._losses):.1f} times its usual value"
            shares = self._shares(told)
            return Trouble(shares[0].step, shares[0].window, what, True, shares)
        self._losses.append(loss)
        return None

    def _shares(self, mine: list[Taken]) -> list[Share]:
        """All ranks' parts of the earliest of some steps."""
        shares = [Share(self.worker.rank, t.step, t.window, t.ids.tolist(), float(t.loss)) for t in mine]
        every = [share for part in from_all(shares) for share in part]
        earliest = min(share.step for share in every)
        return [share for share in every if share.step == earliest]

    def handle(self, trouble: Trouble, skipped: Sequence[int], folder: Folder, corpus: Mixture) -> list[int]:
        """Report trouble and decide: the windows that the run leaves out from its last checkpoint on.

        Args:
            skipped: windows that it leaves out already.

        Raises:
            NonFiniteError: the run stops.
        """
        choice = self.settings.spike if trouble.spike else self.settings.nonfinite
        if self.worker.leads:
            try:
                _report(trouble, folder.child("reports"), corpus)
            except (OSError, ValueError) as error:
                log.warning("the report on step %d could not be written (%s)", trouble.step, error)
        named = [sample for share in trouble.shares for sample in share.ids]
        samples = ", ".join(map(str, named[:16])) + (f" and {len(named) - 16} more" if len(named) > 16 else "")
        what = f"{trouble.what} at step {trouble.step}, samples [{samples}]"
        where = f"The samples are in {folder.url}/reports"
        if choice == "stop":
            raise NonFiniteError(
                f"{what}: the last checkpoint is from before it. A lower optimizer.learning_rate, a longer "
                "optimizer.warmup or optimizer.gradient_clipping=1.0 would do, or "
                f"health.{'spike' if trouble.spike else 'nonfinite'}=skip to leave such batches out. {where}"
            )
        if len(skipped) >= self.settings.max_skips:
            raise NonFiniteError(
                f"{what}, and {len(skipped)} batches were left out already (health.max_skips = "
                f"{self.settings.max_skips}): it is not single batches that do it. {where}"
            )
        log.warning("%s: going back to the last checkpoint, and on without this batch. %s", what, where)
        return sorted([*skipped, trouble.window])


def _is_finite(taken: Taken) -> bool:
    return math.isfinite(float(taken.loss)) and not float(taken.bad)


def _report(trouble: Trouble, folder: Folder, corpus: Mixture) -> None:
    """REPORTS/step-N.json, and beside it the first of the encoded images and a contact sheet of them."""
    name = f"step-{trouble.step:08d}"
    samples = list(dict.fromkeys(sample for share in trouble.shares for sample in share.ids))
    stored = samples[:_STORED_IMAGES]
    report = {
        **asdict(trouble),
        "origins": {sample: corpus.origin(sample) for sample in sorted(samples)},
        "images_stored": f"{len(stored)} of {len(samples)}",
        "images": {},
    }
    for sample, content in zip(stored, corpus.read(np.array(stored)), strict=True):
        suffix = Path(corpus.origin(sample)).suffix or ".jpg"
        report["images"][sample] = f"{name}/{sample}{suffix}"
        folder.write_bytes(f"{name}/{sample}{suffix}", content.tobytes())
    folder.write_json(f"{name}.json", report)
    with temporary_folder("sheet") as scratch:
        sheet = scratch / "sheet.png"
        title = f"step {trouble.step}, {report['images_stored']} images: {trouble.what}"
        draw_contact_sheet(corpus, stored, title, sheet)
        folder.put(sheet, f"{name}/sheet.png")
