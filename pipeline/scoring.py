"""Scoring a model on a corpus: every sample once, over any number of ranks."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from models.losses import dense_targets, sigmoid_cross_entropy, softmax_cross_entropy
from pipeline.loader import EvalLoader


@dataclass(frozen=True)
class Scores:
    """How a model does on a corpus."""

    top1: float
    """Share of images whose highest-scored class is among their labels."""
    top5: float
    """Share of images with one of their labels among the five highest-scored classes."""
    loss: float
    """Mean loss, without label smoothing."""
    images: int

    def as_metrics(self) -> dict[str, float]:
        """The scores by name."""
        return {name: float(value) for name, value in asdict(self).items()}


@torch.no_grad()
def score(
    module: Any,
    loader: EvalLoader,
    kind: Literal["softmax", "sigmoid"],
    dtype: torch.dtype,
    goes_on: Callable[[], bool] = lambda: True,
) -> Scores | None:
    """Score a model; all ranks call it and all get the same scores.

    Args:
        module: images [B, 3, S, S] -> logits [B, C].
        loader: gives this rank its share of the corpus.
        kind: which loss.
        dtype: of the model's weights.
        goes_on: asked before every batch; gives the same answer on all ranks.

    Returns:
        None if it was told not to go on.
    """
    device = loader.worker.device
    loss_of = softmax_cross_entropy if kind == "softmax" else sigmoid_cross_entropy
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    training = module.training
    module.eval()
    for batch in loader:
        if not goes_on():
            module.train(training)
            return None
        logits = module(batch.images.to(dtype)).float()
        count, classes = logits.shape
        targets = dense_targets(batch.rows, batch.classes, batch.weights, count, classes, device)
        # The images that only fill the batch are computed, for the other ranks' sake, and not counted.
        logits, targets = logits[: batch.real], targets[: batch.real]
        if batch.real:
            ranked = logits.topk(min(5, classes), dim=1).indices
            hits = (targets > 0).gather(1, ranked)
            sums += torch.stack(
                [
                    hits[:, 0].sum().double(),
                    hits.any(1).sum().double(),
                    loss_of(logits, targets).double() * batch.real,
                    torch.tensor(float(batch.real), dtype=torch.float64, device=device),
                ]
            )
    module.train(training)
    if dist.is_initialized():
        dist.all_reduce(sums)
    top1, top5, loss, images = sums.tolist()
    return Scores(top1 / images, top5 / images, loss / images, round(images))
