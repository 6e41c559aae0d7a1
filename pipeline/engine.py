"""The DeepSpeed engine of a run: parameter groups, optimizer, ZeRO, precision."""

import logging
import os
import warnings
from typing import Any

import torch

from models.vit import VisionTransformer, kernel_parameters
from pipeline.config import OptimizerSettings
from pipeline.layout import Layout
from pipeline.workers import Worker


def prepare_deepspeed() -> Any:
    """Import DeepSpeed quietly and without building what is not used. Call before the first collective."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # said here, it needs no warning that no GPU was found
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # On CPUs the first collective would compile a shared-memory operator for a minute; gloo does not use it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The model's parameters in two groups: kernels, which decay, and everything else, which does not."""
    kernels = kernel_parameters(model)
    named = dict(model.named_parameters())
    missing = kernels - named.keys()
    assert not missing, missing
    return [
        {"name": "kernels", "params": [p for n, p in named.items() if n in kernels], "weight_decay": weight_decay},
        {"name": "others", "params": [p for n, p in named.items() if n not in kernels], "weight_decay": 0.0},
    ]


def build_optimizer(settings: OptimizerSettings, model: torch.nn.Module, gpu: bool) -> torch.optim.Optimizer:
    """The optimizer of the settings; the learning rate is set every step by the schedule."""
    groups = parameter_groups(model, settings.weight_decay)
    if settings.kind == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=gpu)


def build_engine(
    model: VisionTransformer, settings: OptimizerSettings, layout: Layout, global_batch: int, worker: Worker
) -> Any:
    """A DeepSpeed engine around the model. Every rank must call it (it broadcasts rank 0's weights)."""
    deepspeed = prepare_deepspeed()
    model.checkpoint_blocks = layout.recompute
    if layout.compile:
        model.compile_blocks()
    optimizer = build_optimizer(settings, model, worker.gpu)
    config: dict[str, Any] = {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        # DeepSpeed clips at 1.0 unless told otherwise.
        "gradient_clipping": settings.gradient_clipping,
        "zero_optimization": {"stage": layout.zero_stage, "overlap_comm": worker.gpu, "contiguous_gradients": True},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    if layout.precision == "bf16":
        config["bf16"] = {"enabled": True}
        # With fp32 accumulation at stage 1 DeepSpeed changes to an optimizer whose checkpoints hold no stage, and
        # from which the master weights cannot be read. One micro-batch a step has nothing to accumulate.
        separate = layout.zero_stage == 1 and layout.accumulation == 1
        config["data_types"] = {"grad_accum_dtype": "bf16" if separate else "fp32"}
        config["communication_data_type"] = "fp32"
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def set_learning_rate(engine: Any, rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def reduce_and_update(engine: Any, measure: bool) -> float | None:
    """Reduce, clip and update if this was the last micro-batch of an optimizer step; otherwise only accumulate.

    Args:
        measure: whether the norm is wanted; on a GPU it costs a wait for the device.

    Returns:
        The global norm of the gradient before clipping, if it was wanted and an update was made.
    """
    measure = measure and engine.is_gradient_accumulation_boundary()
    norm = None
    if measure and isinstance(engine.optimizer, torch.optim.Optimizer):
        # Without ZeRO and in fp32 DeepSpeed clips without keeping the norm. The gradients are reduced by now.
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
    engine.step()
    if measure and norm is None:
        kept = engine.get_global_grad_norm()
        norm = float("nan") if kept is None else float(kept)
    return norm
