"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from cluster.settings import SettingsError
from pipeline.config import OptimizerSettings, piece_in_steps


class Schedule:
    """Learning rate of every optimizer step of a run.

    Warm-up rises linearly and reaches the peak at its last step. Then, with u = (step - warm-up) / (total -
    warm-up): linear goes from the peak to the final rate as 1 - u, cosine as (1 + cos(pi u)) / 2; rsqrt is
    peak / sqrt(1 + (step - warm-up) / timescale) as in big_vision's ViT-g recipes, and constant stays at the
    peak, both with a linear fall towards the final rate over the cooldown at the end. The final rate itself would
    come at the step after the last, so that no step is wasted on a rate of 0.

    Args:
        total: optimizer steps of the run.
        global_batch, num_samples: turn durations into steps.

    Raises:
        SettingsError: warm-up and cooldown do not fit into the run.
    """

    def __init__(self, settings: OptimizerSettings, total: int, global_batch: int, num_samples: int) -> None:
        def steps(text: str) -> int:
            return piece_in_steps(text, total, global_batch, num_samples)

        self.settings, self.total = settings, total
        self.warmup, self.timescale = steps(settings.warmup), steps(settings.timescale)
        self.cooldown = steps(settings.cooldown) if settings.schedule in ("rsqrt", "constant") else 0
        if self.warmup + self.cooldown > total:
            parts = [("warmup", settings.warmup, self.warmup), ("cooldown", settings.cooldown, self.cooldown)]
            named = " and ".join(
                f"optimizer.{name} = {text!r} ({steps:,} steps)" for name, text, steps in parts if steps
            )
            raise SettingsError(
                f"{named}: so many do not fit into training.duration, {total:,} steps of {global_batch} images. "
                'Shorten that (optimizer.warmup="5 %" is a share of any run), or train longer'
            )

    def __call__(self, step: int) -> float:
        """Learning rate of step 0, 1, ..., total - 1."""
        peak, final, kind = self.settings.learning_rate, self.settings.final_learning_rate, self.settings.schedule
        if step < self.warmup:
            return peak * (step + 1) / self.warmup
        after = step - self.warmup
        if kind in ("linear", "cosine"):
            share = after / (self.total - self.warmup)
            weight = 1 - share if kind == "linear" else (1 + math.cos(math.pi * share)) / 2
            return final + (peak - final) * weight
        rate = peak / math.sqrt(1 + after / self.timescale) if kind == "rsqrt" else peak
        left = self.total - step
        return final + (rate - final) * left / self.cooldown if left < self.cooldown else rate
