"""Ending a run whose held-out scores no longer improve: what it counts, the same after a restart."""

from collections.abc import Mapping
from typing import Any

from cluster.command import log
from pipeline.config import LOWER_IS_BETTER, EarlyStoppingSettings

STATE = "early_stopping"
"""Key of a checkpoint's state; versions of before have none."""


class EarlyStopping:
    """Counts the evaluations in a row that were no improvement. All ranks see the same scores, and count alike.

    Attributes:
        best: the best score so far, and the step that it is of; None before the first.
        waited: evaluations since then that came no more than min_delta above it (below, for a loss).
    """

    def __init__(self, settings: EarlyStoppingSettings, state: Mapping[str, Any]) -> None:
        self._settings = settings
        self.begin_again(state)

    def begin_again(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state, or from the beginning where that says nothing.

        What was counted by another score counts for nothing.
        """
        known = state.get(STATE) or {}
        if known.get("monitor") != self._settings.monitor:
            known = {}
        self.best: tuple[float, int] | None = tuple(known["best"]) if known.get("best") else None
        self.waited: int = known.get("waited", 0)
        self._judged: int = known.get("judged", -1)

    def judge(self, step: int, scores: Mapping[str, float]) -> None:
        """Count an evaluation. The same step is counted once, however often it is scored."""
        patience, monitor = self._settings.patience, self._settings.monitor
        if patience is None or step <= self._judged:
            return
        self._judged = step
        score = scores[monitor]
        if self._improves(score):
            self.best, self.waited = (score, step), 0
            return
        self.waited += 1
        if self.waited >= patience:
            log.info(
                "step %d: %s has not improved%s for %d evaluation(s): the run ends here (early_stopping.patience)",
                step,
                monitor,
                f" on {self.best[0]:.4f} of step {self.best[1]}" if self.best else "",
                self.waited,
            )

    def _improves(self, score: float) -> bool:
        if score != score:  # not a number
            return False
        if self.best is None:
            return True
        gain = score - self.best[0] if self._settings.monitor not in LOWER_IS_BETTER else self.best[0] - score
        return gain > self._settings.min_delta

    @property
    def ended(self) -> bool:
        """Whether training ends here."""
        return self._settings.patience is not None and self.waited >= self._settings.patience

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        best = None if self.best is None else list(self.best)
        return {"monitor": self._settings.monitor, "best": best, "waited": self.waited, "judged": self._judged}


def ended(settings: EarlyStoppingSettings, state: Mapping[str, Any]) -> bool:
    """Whether a run with these settings ends with a checkpoint of this state. With more patience it goes on."""
    return EarlyStopping(settings, state).ended
