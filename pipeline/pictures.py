"""What people would rather see than read: the first batch as the model gets it, and the curves of a run."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.redact import printable


def draw_batch(
    images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...], names: list[str], path: Path
) -> None:
    """A contact sheet of up to 32 training images with their labels, which the file's Description has too.

    Args:
        images: float [B, 3, S, S], normalised with mean and std.
        names: [B] what stands above each image, up to two lines.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = min(len(images), 32)
    columns = min(count, 8)
    rows = -(-count // columns)
    lines = max((name.count("\n") for name in names[:count]), default=0)
    figure, axes = pyplot.subplots(rows, columns, figsize=(1.6 * columns, (1.8 + 0.15 * lines) * rows), squeeze=False)
    pixels = images[:count].float().cpu().permute(0, 2, 3, 1).numpy() * np.array(std) + np.array(mean)
    titles = ["\n".join(printable(line)[:20] for line in name.split("\n")) for name in names[:count]]
    for index, axis in enumerate(axes.flat):
        axis.axis("off")
        if index < count:
            axis.imshow(pixels[index].clip(0, 1))
            # A class's name is text: `$` in it begins no formula.
            axis.set_title(titles[index], fontsize=8, parse_math=False)
    figure.tight_layout()
    described = "; ".join(title.replace("\n", ", ") for title in titles)
    figure.savefig(path, dpi=80, metadata={"Description": described.encode("latin-1", "replace").decode("latin-1")})
    pyplot.close(figure)


def label_lines(targets: torch.Tensor, classes: Sequence[str]) -> list[str]:
    """What a model is told of each image, for people: its one class, or the two with the largest weights, in per cent.

    Args:
        targets: float [B, C], the weights of the classes.
    """
    lines = []
    weights, numbers = targets.float().cpu().topk(min(3, targets.shape[1]), dim=1)
    for row, of in zip(weights.tolist(), numbers.tolist(), strict=True):
        shares = [(classes[number], weight) for number, weight in zip(of, row, strict=True) if weight > 0]
        # A share that would be shown as "0 %" says nothing; where all are as small, they are shown as they are.
        found = [(name, weight) for name, weight in shares if weight >= 0.005] or shares
        if all(abs(weight - 1) < 0.005 for _, weight in found):
            shown = [_short(name, 18) for name, _ in found[:2]]
        else:
            shown = [f"{_short(name, 12)} {100 * weight:.0f} %" for name, weight in found[:2]]
        lines.append("\n".join(shown) + (" ..." if len(found) > 2 else ""))
    return lines


def _short(name: str, length: int) -> str:
    text = printable(name)
    return text if len(text) <= length else text[: length - 3] + "..."


Rows = Sequence[Mapping[str, Any]]

_LOSSES = {"loss": "training", "heldout/loss": "held-out"}
_SHARES = {"heldout/top1": "top-1", "heldout/top5": "top-5"}


def draw_curves(rows: Rows, path: Path, steps_per_epoch: float | None = None, handed_over: int | None = None) -> None:
    """A picture of `curves_of`."""
    from matplotlib import pyplot

    figure = curves_of(rows, steps_per_epoch, handed_over)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def curves_of(rows: Rows, steps_per_epoch: float | None = None, handed_over: int | None = None) -> Any:
    """The course of a run: losses, held-out accuracy, learning rate, gradient norm, throughput; matplotlib's Figure.

    A panel needs a curve of two points; scores are said in words, too.

    Args:
        rows: of a metrics file.
        steps_per_epoch: for the scale of epochs above each panel; None leaves it out.
        handed_over: the step whose weights are handed over, for a line through the panels of scores.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: list[tuple[str, dict[str, str], float]] = [
        ("loss", _LOSSES, 1),
        ("held-out accuracy in %", _SHARES, 100),
        ("learning rate", {"learning_rate": ""}, 1),
        ("gradient norm", {"gradient_norm": ""}, 1),
        ("images/s", {"images_per_second": ""}, 1),
    ]
    present = [panel for panel in panels if any(len(_points(rows, key)) > 1 for key in panel[1])]
    columns = min(max(len(present), 1), 3)
    lines = -(-max(len(present), 1) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(4.4 * columns, 3.3 * lines + 0.3), squeeze=False)
    for axis in axes.flat[len(present) :]:
        axis.axis("off")
    for axis, (title, curves, scale) in zip(axes.flat, present, strict=False):
        scored = curves is _LOSSES or curves is _SHARES
        _draw_panel(axis, rows, curves, scale)
        axis.set_title(title, fontsize=10)
        if scored and handed_over is not None and any("heldout/top1" in row for row in rows):
            axis.axvline(handed_over, color="gray", linewidth=1, linestyle=":", label="handed over")
        if len(axis.get_legend_handles_labels()[1]) > 1:
            axis.legend(fontsize=8)
        if steps_per_epoch:
            above = axis.secondary_xaxis("top", functions=(_times(1 / steps_per_epoch), _times(steps_per_epoch)))
            above.set_xlabel("epoch", fontsize=8)
            above.tick_params(labelsize=7)
    if words := _in_words(rows, steps_per_epoch):
        figure.suptitle(words, fontsize=9, x=0.01, ha="left")
    figure.tight_layout()
    return figure


def _draw_panel(axis: Any, rows: Rows, curves: Mapping[str, str], scale: float) -> None:
    for key, label in curves.items():
        points = _points(rows, key)
        if not points or (key == "heldout/top5" and all(value == 1 for _, value in points)):  # of up to five classes
            continue
        steps, values = zip(*points, strict=True)
        # A single point beside another curve is a mark.
        marker = "o" if len(points) < 15 else None
        axis.plot(steps, [scale * v for v in values], linewidth=1.2, marker=marker, markersize=3, label=label or None)
    axis.set_xlabel("step", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)


def _points(rows: Rows, key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _times(factor: float) -> Callable[[Any], Any]:
    return lambda value: value * factor


def _in_words(rows: Rows, steps_per_epoch: float | None) -> str:
    """The last step's scores, in a line; without any, its loss."""
    scores = [row for row in rows if row.get("heldout/top1") is not None]
    if not scores:
        losses = _points(rows, "loss")
        return f"step {losses[-1][0]:,}: loss {losses[-1][1]:.4f}" if losses else ""
    last, best = scores[-1], max(scores, key=lambda row: float(row["heldout/top1"]))
    epoch = f" (epoch {last['step'] / steps_per_epoch:.3g})" if steps_per_epoch else ""
    words = f"step {last['step']:,}{epoch}: held-out top-1 {100 * last['heldout/top1']:.2f} %"
    if best["step"] != last["step"] and best["heldout/top1"] > last["heldout/top1"]:
        words += f"; best {100 * best['heldout/top1']:.2f} % at step {best['step']:,}"
    return words
