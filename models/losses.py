"""The two losses of supervised pre-training, on dense targets, computed in fp32 whatever the logits are."""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Softmax cross-entropy, averaged over images. A scalar, fp32.

    Args:
        logits: [B, C].
        targets: [B, C], each row a distribution over the classes.
        label_smoothing: share s of the uniform distribution: targets become (1 - s) targets + s / C
            (arXiv 1512.00567, section 7).
    """
    return F.cross_entropy(logits.float(), targets.float(), label_smoothing=label_smoothing)


def sigmoid_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of each class, summed over classes and averaged over images. A scalar, fp32.

    Summed as in arXiv 2010.11929's code: an average over classes would change what Adam's epsilon and the
    gradient clip mean.

    Args:
        logits: [B, C].
        targets: [B, C], each entry the weight of the class from 0 to 1.
    """
    logits = logits.float()
    # Not F.binary_cross_entropy_with_logits: in fp32 it is off by up to 2 % for each class at a logit of -10,
    # where the paper's recipes start with all of theirs.
    return (F.softplus(logits) - logits * targets).sum() / len(logits)


def dense_targets(
    rows: npt.NDArray[np.int64],
    classes: npt.NDArray[np.int64],
    weights: npt.NDArray[np.float32],
    batch: int,
    num_classes: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Sparse labels as a matrix [batch, num_classes], fp32: entry (rows[k], classes[k]) is weights[k], others 0.

    The sparse form crosses to the device, not the matrix. A class that an image names twice gets both weights.

    Args:
        rows, classes, weights: [K] each; image within the batch, class, weight.

    Raises:
        ValueError: a class or a row out of range.
    """
    for name, values, end in (("class", classes, num_classes), ("row", rows, batch)):
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < end:
            wrong = int(values.min()) if values.min() < 0 else int(values.max())
            raise ValueError(f"label with {name} {wrong}: only 0 to {end - 1} exist")
    flat = torch.from_numpy(np.asarray(rows, np.int64) * num_classes + classes).to(device, non_blocking=True)
    label_weights = torch.from_numpy(np.asarray(weights, np.float32)).to(device, non_blocking=True)
    targets = torch.zeros(batch * num_classes, device=device)
    return targets.index_add_(0, flat, label_weights).view(batch, num_classes)
