"""Images/s, MFU, time spent waiting for data, time left; the log line that shows them."""

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from cluster.command import duration
from models.vit import VitConfig
from pipeline.layout import Layout
from pipeline.workers import Worker

PEAK_TFLOPS = {
    "A100": 312,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "GH200": 989,
    "B200": 2250,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A10": 125,
}
"""Dense bf16 tensor-core peak by the vendor's datasheets, for the longest name that stands in the GPU's as words."""


def peak_flops(worker: Worker, precision: str) -> float | None:
    """FLOP/s that one rank's device can do at most, or None where it is not known."""
    if not worker.gpu or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(worker.device)
    known = sorted((key for key in PEAK_TFLOPS if re.search(rf"\b{re.escape(key)}\b", name)), key=len)
    return PEAK_TFLOPS[known[-1]] * 1e12 if known else None


def attention_backend(config: VitConfig, layout: Layout, device: torch.device) -> str:
    """Which implementation torch's scaled_dot_product_attention takes for this model here."""
    if device.type != "cuda":
        return "torch SDPA"
    from torch.nn.attention import SDPBackend, sdpa_kernel

    width = config.width // config.heads
    q = torch.zeros(2, config.heads, config.tokens, width, device=device, dtype=layout.dtype, requires_grad=True)
    order = torch._C._get_sdp_priority_order()
    names = {
        backend.value if isinstance(backend.value, int) else int(backend): backend
        for backend in SDPBackend.__members__.values()
    }
    for choice in order:
        backend = names.get(int(choice))
        if backend is None:
            continue
        try:
            with sdpa_kernel([backend]):
                torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
            extra = f" (cuDNN {torch.backends.cudnn.version()})" if backend == SDPBackend.CUDNN_ATTENTION else ""
            return f"{backend.name.lower()}{extra}"
        except RuntimeError:
            continue
    return "torch SDPA"


class Meter:
    """Measures the training loop between two log lines.

    Args:
        steps: how many the loop will take.
        global_batch: images a step.
        flops: of training on one image.
        peak: FLOP/s of one rank's device, if known.
        ranks: how many there are.

    Attributes:
        longest_step_s: seconds that a step took at most, not counting the first one.
    """

    def __init__(self, steps: int, global_batch: int, flops: float, peak: float | None, ranks: int) -> None:
        self.steps, self.global_batch, self.flops = steps, global_batch, flops
        self.peak, self.ranks = peak, ranks
        self.started = self._since = time.perf_counter()
        self._at = 0
        self._waited = self._idle = self._stalled = 0.0
        self._first_done: tuple[int, float] | None = None
        self.longest_step_s = 0.0
        self._stepped, self._step_began = False, self.started

    def step_begins(self) -> None:
        """A step is about to be taken."""
        self._step_began = time.perf_counter()

    def step_ended(self) -> None:
        """It was taken."""
        if self._stepped:  # the first one may compile for minutes
            self.longest_step_s = max(self.longest_step_s, time.perf_counter() - self._step_began)
        self._stepped = True

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in this block is spent waiting for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in this block (saving, scoring) is left out of the training rate."""
        begin = time.perf_counter()
        yield
        self._idle += time.perf_counter() - begin

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Time in this block is spent waiting for a checkpoint; it is left out of the training rate too."""
        before = self._idle
        with self.paused():
            yield
        self._stalled += self._idle - before

    def measure(self, done: int) -> dict[str, float]:
        """Rates since the last call, `done` steps after the loop began."""
        now = time.perf_counter()
        seconds = max(now - self._since - self._idle, 1e-9)
        rate = (done - self._at) * self.global_batch / seconds
        values = {"images_per_second": rate, "data_wait": self._waited / seconds}
        values["checkpoint_stall"] = self._stalled / (now - self._since)
        if self.peak:
            values["mfu"] = rate * self.flops / (self.peak * self.ranks)
        self._since, self._at, self._waited, self._idle, self._stalled = now, done, 0.0, 0.0, 0.0
        if self._first_done is None:
            self._first_done = (done, now)
        return values

    def total(self, done: int, before: Mapping[str, float] | None) -> dict[str, float]:
        """Images and wall seconds of a run, with evaluations and checkpoints, `done` steps after the loop began.

        Args:
            before: this of the checkpoint that the loop went on from.
        """
        earlier = before or {"images": 0, "seconds": 0.0}
        return {
            "images": earlier["images"] + done * self.global_batch,
            "seconds": earlier["seconds"] + self.elapsed(),
        }

    def seconds_left(self, done: int) -> float | None:
        """Estimate from the steps since the first measurement, which holds the warm-up of everything; None at it."""
        assert self._first_done is not None
        first, at = self._first_done
        if done == first:
            return None
        return (self.steps - done) * (time.perf_counter() - at) / (done - first)

    def elapsed(self) -> float:
        """Seconds since the loop began."""
        return time.perf_counter() - self.started


def log_line(step: int, total: int, values: dict[str, float], seconds_left: float | None) -> str:
    """What a practitioner looks for, on one line."""
    parts = [
        f"step {step:,}/{total:,}",
        f"loss {values['loss']:.4f}",
        f"lr {values['learning_rate']:.2e}",
        f"grad norm {values['gradient_norm']:.3g}",
        f"{values['images_per_second']:,.0f} images/s",
    ]
    if "mfu" in values:
        parts.append(f"MFU {100 * values['mfu']:.1f} %")
    parts.append(f"data wait {100 * values['data_wait']:.1f} %")
    if values["checkpoint_stall"]:
        parts.append(f"checkpoint stall {100 * values['checkpoint_stall']:.1f} %")
    if "bad_samples" in values:
        parts.append(f"{values['bad_samples']:,.0f} bad samples replaced")
    if step < total and seconds_left is not None:
        parts.append(f"{duration(seconds_left)} left")
    return ", ".join(parts)
