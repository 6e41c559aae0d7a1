"""The losses against their definitions, in precision and in what they sum and average."""

import numpy as np
import pytest
import torch

from models.losses import dense_targets, sigmoid_cross_entropy, softmax_cross_entropy

ROWS, CLASSES = np.array([0, 1, 1, 3]), np.array([2, 0, 4, 1])
WEIGHTS = np.array([1.0, 0.25, 0.75, 1.0], np.float32)


def test_dense_targets_place_the_weights():
    targets = dense_targets(ROWS, CLASSES, WEIGHTS, batch=4, num_classes=5)
    assert targets.dtype == torch.float32
    assert targets.tolist() == [[0, 0, 1, 0, 0], [0.25, 0, 0, 0, 0.75], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]


def test_dense_targets_add_up_a_class_named_twice():
    targets = dense_targets(np.array([0, 0]), np.array([1, 1]), np.array([0.5, 0.25], np.float32), 1, 2)
    assert targets.tolist() == [[0, 0.75]]


def test_dense_targets_take_no_labels_at_all():
    nothing = np.array([], np.int64)
    assert not dense_targets(nothing, nothing, np.array([], np.float32), 2, 3).any()


@pytest.mark.parametrize(("row", "label", "message"), [(0, 5, "class 5: only 0 to 4"), (4, 0, "row 4: only 0 to 3"),
                                                       (0, -1, "class -1")])  # fmt: skip
def test_dense_targets_refuse_what_does_not_exist(row: int, label: int, message: str):
    with pytest.raises(ValueError, match=message):
        dense_targets(np.array([0, row]), np.array([1, label]), np.ones(2, np.float32), 4, 5)


def test_softmax_cross_entropy_is_its_definition():
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 5, dtype=torch.float64), torch.rand(4, 5, dtype=torch.float64)
    targets /= targets.sum(dim=1, keepdim=True)
    for smoothing in (0.0, 0.1):
        smooth = (1 - smoothing) * targets + smoothing / 5
        expected = -(smooth * logits.log_softmax(dim=1)).sum(dim=1).mean()
        got = softmax_cross_entropy(logits, targets, smoothing)
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(expected.item(), rel=1e-6)


def test_sigmoid_cross_entropy_sums_over_classes_and_averages_over_images():
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 5, dtype=torch.float64), torch.rand(4, 5, dtype=torch.float64)
    p = logits.sigmoid()
    expected = -(targets * p.log() + (1 - targets) * (1 - p).log()).sum() / 4
    assert sigmoid_cross_entropy(logits, targets).item() == pytest.approx(expected.item(), rel=1e-6)


def test_sigmoid_loss_at_the_start_is_small_with_the_papers_head_bias():
    targets = dense_targets(np.array([0]), np.array([7]), np.ones(1, np.float32), 1, 21843)
    start = sigmoid_cross_entropy(torch.full((1, 21843), -10.0), targets)
    assert start.item() == pytest.approx(10 + 21843 * np.log1p(np.exp(-10.0)), rel=1e-4)


@pytest.mark.parametrize("loss", [softmax_cross_entropy, sigmoid_cross_entropy])
def test_losses_of_bf16_logits_are_computed_in_fp32(loss):
    torch.manual_seed(0)
    logits = (torch.randn(8, 1000) * 4).bfloat16().requires_grad_()
    targets = torch.nn.functional.one_hot(torch.arange(8), 1000)
    value = loss(logits, targets)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(logits.detach().double(), targets).item(), rel=1e-6)
    value.backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("loss", [softmax_cross_entropy, sigmoid_cross_entropy])
def test_losses_stay_finite_at_extreme_logits(loss):
    logits = torch.tensor([[3e4, -3e4, 0.0]], requires_grad=True)
    loss(logits, torch.tensor([[0.0, 1.0, 0.0]])).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
