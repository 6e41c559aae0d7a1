"""The optimizers: torch's, with an average of the weights and a guard against updates that are not finite.

Both work where DeepSpeed calls the optimizer, on a rank's own part of the weights (the whole of them at ZeRO
stage 0), so that the average is sharded, saved and moved between layouts as every other state is.
"""

from collections.abc import Iterable
from typing import Any

import torch

EMA = "ema"
"""Key of the averaged weights among an optimizer's states."""


def averaging_decay(decay: float, step: int) -> float:
    """Decay of the average at step 0, 1, ...: min(decay, (1 + t) / (10 + t)).

    The warm-up, as in TensorFlow's ExponentialMovingAverage, forgets the random weights of the start.
    """
    return min(decay, (1 + step) / (10 + step))


class Guard:
    """Remembers on the device whether a gradient was not finite; from then on no update is applied.

    Attributes:
        flag: float32 scalar on the device of the weights: 1 from the first gradient that was not finite, else 0.
            It comes from a norm over all ranks, so that it is the same on each. Reading it waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.flag = torch.zeros((), device=device)

    def note(self, norm: torch.Tensor) -> None:
        """Take the norm of the whole gradient into account, without waiting for its value."""
        bad = ~torch.isfinite(norm.detach()) | (norm.detach() < 0)  # DeepSpeed writes -1 where a norm is not finite
        self.flag.copy_(torch.maximum(self.flag, bad.to(self.flag)))

    def reset(self) -> None:
        """Forget it: good weights were loaded."""
        self.flag.zero_()


class GuardedOptimizer(torch.optim.Optimizer):
    """What is added to torch's optimizers, of which one stands behind it in the order of the classes.

    Args:
        groups: parameter groups; "ema_decay" in them is the decay of the average in the next step.
        guard: notes and skips updates that are not finite.
        averages: whether to keep an exponential moving average of the weights.
        clip: where the optimizer sees the whole gradient (ZeRO stage 0) the largest norm it may have, 0 for any;
            None where DeepSpeed measures and clips it.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        guard: Guard,
        averages: bool,
        clip: float | None,
        **options: Any,
    ) -> None:
        super().__init__(groups, **options)
        self.guard, self.averages, self.clip = guard, averages, clip
        self.norm: torch.Tensor | None = None
        self.found_inf: torch.Tensor

    def blank_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The states of a parameter before its first update."""
        states = self._blank_moments(parameter)
        if self.averages:
            states[EMA] = parameter.detach().clone()
        return states

    def _blank_moments(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters that have gradients, unless a gradient was not finite."""
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        parameters = [parameter for _, some in groups for parameter in some]
        if self.clip is not None:
            self.norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            self.guard.note(self.norm)
            if self.clip:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.clip, self.norm)
        if self.guard.flag.is_cuda:
            self.found_inf = self.guard.flag  # torch's fused kernels skip the update by it
        elif self.guard.flag.item():
            return
        for parameter in parameters:
            if not self.state.get(parameter):
                self.state[parameter] = self.blank_state(parameter)
        super().step()
        if self.averages:
            for group, some in groups:
                weight = (1.0 - group["ema_decay"]) * (1.0 - self.guard.flag)
                for parameter in some:
                    self.state[parameter][EMA].lerp_(parameter.detach(), weight)


class AdamW(GuardedOptimizer, torch.optim.AdamW):
    """AdamW (arXiv 1711.05101)."""

    def _blank_moments(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        device = parameter.device if self.defaults["fused"] else torch.device("cpu")
        return {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }


class SGD(GuardedOptimizer, torch.optim.SGD):
    """Stochastic gradient descent with momentum."""

    def _blank_moments(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        # With a momentum of 0 the first update is the one that torch makes without one.
        if not self.defaults["momentum"]:
            return {}
        return {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)}
