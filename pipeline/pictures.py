"""What people would rather see than read: the first batch as the model gets it, and the curves of a run."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.redact import printable


def draw_batch(
    images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...], names: list[str], path: Path
) -> None:
    """A contact sheet of up to 32 training images with their labels.

    Args:
        images: float [B, 3, S, S], normalised with mean and std.
        names: [B] label of each image.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = min(len(images), 32)
    columns = min(count, 8)
    rows = -(-count // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(1.6 * columns, 1.8 * rows), squeeze=False)
    pixels = images[:count].float().cpu().permute(0, 2, 3, 1).numpy() * np.array(std) + np.array(mean)
    for index, axis in enumerate(axes.flat):
        axis.axis("off")
        if index < count:
            axis.imshow(pixels[index].clip(0, 1))
            # A class's name is text: `$` in it begins no formula.
            axis.set_title(printable(names[index])[:18], fontsize=8, parse_math=False)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss, learning rate, held-out accuracy and throughput over the steps, from the rows of a metrics file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        ("loss", "training loss"),
        ("learning_rate", "learning rate"),
        ("gradient_norm", "gradient norm"),
        ("heldout/top1", "held-out top-1 accuracy"),
        ("images_per_second", "images/s"),
    ]
    present = [(key, title) for key, title in panels if any(key in row for row in rows)]
    figure, axes = pyplot.subplots(1, len(present), figsize=(4 * len(present), 3), squeeze=False)
    for axis, (key, title) in zip(axes[0], present, strict=True):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        axis.plot(*zip(*points, strict=True), linewidth=1.2, marker="o" if len(points) < 15 else None, markersize=3)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
