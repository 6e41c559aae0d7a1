"""The DeepSpeed engine of a run: parameter groups, optimizer, ZeRO, precision."""

import contextlib
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from models.vit import VisionTransformer, kernel_parameters
from pipeline.config import OptimizerSettings
from pipeline.layout import Layout
from pipeline.optimizer import SGD, AdamW, Guard, GuardedOptimizer
from pipeline.workers import Worker


def prepare_deepspeed() -> Any:
    """Import DeepSpeed quietly and without building what is not used. Call before the first collective."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # said here, it needs no warning that no GPU was found
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    with _without("mlflow"):
        import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # On CPUs the first collective would compile a shared-memory operator for a minute; gloo does not use it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def _without(module: str) -> Iterator[None]:
    """In the block, importing a module that nothing has imported yet fails.

    (DeepSpeed 0.19's autotuner, which we do not use, imports MLflow where it is installed: 1.5 s of every rank.)
    """
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # as Python documents it
    try:
        yield
    finally:
        del sys.modules[module]


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


def build_optimizer(
    settings: OptimizerSettings, model: torch.nn.Module, worker: Worker, whole: bool, averages: bool
) -> GuardedOptimizer:
    """The optimizer of the settings; the learning rate is set every step by the schedule.

    Args:
        whole: the optimizer updates all weights on every rank (ZeRO stage 0).
        averages: it keeps an exponential moving average of the weights.
    """
    groups = parameter_groups(model, settings.weight_decay)
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "fused": worker.gpu,
        "guard": Guard(worker.device),
        "averages": averages,
        "clip": settings.gradient_clipping if whole else None,
    }
    if settings.kind == "sgd":
        return SGD(groups, momentum=settings.momentum, **options)
    return AdamW(groups, betas=settings.betas, eps=settings.eps, **options)


def build_engine(
    model: VisionTransformer,
    settings: OptimizerSettings,
    layout: Layout,
    global_batch: int,
    worker: Worker,
    averages: bool = False,
) -> Any:
    """A DeepSpeed engine around the model. Every rank must call it (it broadcasts rank 0's weights).

    Args:
        averages: keep an exponential moving average of the weights beside them.
    """
    deepspeed = prepare_deepspeed()
    model.checkpoint_blocks = layout.recompute
    if layout.compile:
        model.compile_blocks()
    whole = layout.zero_stage == 0
    optimizer = build_optimizer(settings, model, worker, whole, averages)
    config: dict[str, Any] = {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        # DeepSpeed clips at 1.0 unless told otherwise. The whole gradient our optimizer clips itself.
        "gradient_clipping": 0.0 if whole else settings.gradient_clipping,
        "zero_optimization": {"stage": layout.zero_stage, "overlap_comm": worker.gpu, "contiguous_gradients": True},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        # It would wait for the device before and after every micro-batch; we measure by ourselves.
        "timers": {"throughput": {"enabled": False}},
    }
    if layout.precision == "bf16":
        # Its own search for gradients that are not finite would wait for the device in every step.
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}
        # With fp32 accumulation at stage 1 DeepSpeed changes to an optimizer whose checkpoints hold no stage, and
        # from which the master weights cannot be read. One micro-batch a step has nothing to accumulate.
        separate = layout.zero_stage == 1 and layout.accumulation == 1
        config["data_types"] = {"grad_accum_dtype": "bf16" if separate else "fp32"}
        config["communication_data_type"] = "fp32"
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    if not whole:
        _guard_without_waiting(engine.optimizer, optimizer.guard)
    return engine


def _guard_without_waiting(zero: Any, guard: Guard) -> None:
    """Let the guard see the norm of the whole gradient before DeepSpeed updates anything.

    DeepSpeed asks the device in every step whether the norm is finite, which the host would wait for, and passes
    over an update that is not, in silence. Our optimizer does that on the device, and the loop hears of it.
    """
    from deepspeed.runtime.utils import combine_grad_norm_groups
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    for module in (stage3, stage_1_and_2):
        module.is_invalid_grad_norm = lambda norm: False
    if hasattr(zero, "scaled_global_norm"):
        measure = zero.scaled_global_norm

        def scaled_global_norm(*arguments: Any, **options: Any) -> torch.Tensor:
            norm: torch.Tensor = measure(*arguments, **options)
            guard.note(norm)
            return norm

        zero.scaled_global_norm = scaled_global_norm
    else:
        measure_groups = zero._get_norm_groups

        def norm_groups() -> Any:
            norms = measure_groups()
            guard.note(combine_grad_norm_groups(norms))
            return norms

        zero._get_norm_groups = norm_groups


def base_optimizer(engine: Any) -> GuardedOptimizer:
    """Our optimizer inside an engine."""
    optimizer = engine.optimizer
    found = optimizer if isinstance(optimizer, GuardedOptimizer) else optimizer.optimizer
    assert isinstance(found, GuardedOptimizer), type(found)
    return found


def nonfinite_flag(engine: Any) -> torch.Tensor:
    """float32 scalar on the device: 1 since a gradient was not finite. Updates have been skipped since then.

    The same on every rank. Reading it waits for the device; copy it without blocking and look a step later.
    Loading a checkpoint resets it.
    """
    return base_optimizer(engine).guard.flag


def set_learning_rate(engine: Any, rate: float, ema_decay: float = 0.0) -> None:
    """Set the learning rate of every parameter group, and the decay of the average, for the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
        group["ema_decay"] = ema_decay


def reduce_and_update(engine: Any, measure: bool) -> float | None:
    """Reduce, clip and update if this was the last micro-batch of an optimizer step; otherwise only accumulate.

    Args:
        measure: whether the norm is wanted; on a GPU it costs a wait for the device.

    Returns:
        The global norm of the gradient before clipping, if it was wanted and an update was made.
    """
    measure = measure and engine.is_gradient_accumulation_boundary()
    engine.step()
    if not measure:
        return None
    base = base_optimizer(engine)
    kept = base.norm if base.clip is not None else engine.get_global_grad_norm()
    return float("nan") if kept is None else float(kept)


def destroy(engine: Any) -> None:
    """End an engine. Its memory is free when the caller has dropped it and its outputs, and called `free_memory`."""
    from deepspeed.runtime.zero import parameter_offload

    engine.destroy()
    parameter_offload.FWD_MODULE_STACK.clear()  # at stage 3 it holds the last module that ran


def free_memory() -> None:
    """Give back what nobody names any more."""
    gc.collect()  # an engine refers to itself
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
