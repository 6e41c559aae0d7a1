"""How a run is laid out on its ranks: precision, micro-batch, accumulation, ZeRO stage.

The layout changes speed and memory, not which samples an optimizer step uses. Memory formulae: see
`state_bytes` and `activation_bytes`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from cluster.settings import SettingsError
from models.presets import count_parameters
from models.vit import VitConfig
from pipeline.config import StageSettings
from pipeline.workers import Worker

USABLE_MEMORY = 0.85
"""Share of a device's memory that a layout may plan with; the rest is workspace and fragmentation."""
LARGEST_CPU_MICRO_BATCH = 64
"""On CPUs larger micro-batches fall out of the caches and gain nothing."""

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Layout:
    """The settled layout of a run."""

    precision: Precision
    micro_batch: int
    accumulation: int
    zero_stage: int
    compile: bool
    recompute: bool

    @property
    def dtype(self) -> torch.dtype:
        """dtype of weights and activations."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def check_batch(global_batch: int, micro_batch: int | None, ranks: int, pairs: bool) -> None:
    """Refuse a global batch that does not split evenly over ranks and micro-batches.

    Args:
        pairs: images mix in pairs (mixup, cutmix), so that a micro-batch must be even.

    Raises:
        SettingsError: naming the ranks or micro-batches that would do.
    """
    if global_batch % ranks:
        raise SettingsError(
            f"training.global_batch = {global_batch} does not split over {ranks} ranks: use run.workers = "
            f"{_some(_divisors(global_batch), ranks)}, or a global batch that is a multiple of {ranks}"
        )
    share = global_batch // ranks
    fitting = _micro_batches(share, pairs)
    if not fitting:
        raise SettingsError(
            f"training.global_batch = {global_batch} gives each of {ranks} ranks {share} images; data.augment.mixup "
            "and cutmix mix pairs and need an even number"
        )
    if micro_batch is not None and micro_batch not in fitting:
        mixing = " into pairs for data.augment.mixup or cutmix" if pairs and share % micro_batch == 0 else ""
        raise SettingsError(
            f"training.micro_batch = {micro_batch} does not split the {share} images of a rank "
            f"(training.global_batch = {global_batch} over {ranks} ranks){mixing}: use {_some(fitting, micro_batch)}"
        )


def settle(
    settings: StageSettings, config: VitConfig, ranks: int, machine: "Machine", saved: Mapping[str, Any] | None = None
) -> Layout:
    """Fill in what the settings leave open.

    Args:
        ranks: world size.
        machine: what the poorest of the ranks has.
        saved: state of the checkpoint that is resumed: what it was written with takes the place of "auto" and null,
            on another number of ranks as far as it fits there.

    Raises:
        SettingsError: the batch does not split, or the model does not fit at any stage.
    """
    training = settings.training
    pairs = settings.data.augment.mixes
    check_batch(training.global_batch, training.micro_batch, ranks, pairs)
    saved = saved or {}
    gpu = machine.gpu
    precision = settle_precision(training.precision, machine, saved.get("precision"))
    share = training.global_batch // ranks
    budget = USABLE_MEMORY * machine.memory
    sizes = _micro_batches(share, pairs)
    smallest = training.micro_batch or sizes[0]

    def fits(zero_stage: int, micro_batch: int) -> bool:
        needed = state_bytes(config, precision, zero_stage, ranks, training.ema > 0)
        return needed + micro_batch * activation_bytes(config, precision, training.recompute) <= budget

    # Bit by bit as before only in the same layout; GPUs with less memory need another.
    same_ranks = saved.get("world_size") == ranks and (not gpu or machine.memory >= 0.95 * saved.get("memory", 0))
    least = 1 if precision == "bf16" else 0
    if training.zero_stage != "auto":
        zero_stage = training.zero_stage
    elif saved and (same_ranks or (saved["zero_stage"] >= least and fits(saved["zero_stage"], smallest))):
        zero_stage = saved["zero_stage"]
    else:
        # Without ZeRO DeepSpeed keeps no usable master weights in bf16; on one rank stage 1 shards nothing.
        candidates = range(least, 4 if ranks > 1 else least + 1)
        fitting = [candidate for candidate in candidates if fits(candidate, smallest)]
        if not fitting:
            needed = state_bytes(config, precision, 3 if ranks > 1 else least, ranks, training.ema > 0) / 2**30
            images = smallest * activation_bytes(config, precision, training.recompute) / 2**30
            raise SettingsError(
                f"the model needs about {needed:.1f} GiB a rank for its states and {images:.1f} GiB for "
                f"{smallest} images, at the highest ZeRO stage; {budget / 2**30:.1f} GiB can be used. More ranks, "
                "training.recompute=true or a smaller training.micro_batch would do; training.zero_stage=3 skips "
                "this estimate"
            )
        zero_stage = fitting[0]
    if precision == "bf16" and zero_stage == 0:
        raise SettingsError(
            "training.zero_stage = 0 keeps no fp32 master weights with bf16: use 1 (on one rank it shards nothing), "
            "auto, or training.precision=fp32"
        )
    micro_batch = training.micro_batch or saved.get("micro_batch")
    if micro_batch not in _micro_batches(share, pairs) or not (
        training.micro_batch or same_ranks or fits(zero_stage, micro_batch)
    ):
        sizes = [size for size in sizes if gpu or size <= LARGEST_CPU_MICRO_BATCH] or sizes[:1]
        micro_batch = max((size for size in sizes if fits(zero_stage, size)), default=sizes[0])
    if precision == "bf16" and zero_stage == 1 and share != micro_batch:
        if training.zero_stage == 1:
            raise SettingsError(
                f"training.zero_stage = 1 with bf16 and {share // micro_batch} micro-batches a step: it would add them "
                "up in bf16; use 2 (which adds up in fp32) or auto"
            )
        zero_stage = 2
    compiled = gpu if training.compile == "auto" else training.compile
    return Layout(precision, micro_batch, share // micro_batch, zero_stage, compiled, training.recompute)


@dataclass(frozen=True)
class Machine:
    """What a rank has to compute with."""

    gpu: bool
    memory: int
    """Bytes that the rank may use: its GPU's, or its share of what the machine has free."""
    bf16: bool
    """Whether bf16 is faster than fp32: on GPUs, and on CPUs that multiply in bf16 by themselves."""

    @classmethod
    def here(cls, worker: Worker) -> "Machine":
        """What this rank has."""
        if worker.gpu:
            memory = torch.cuda.get_device_properties(worker.device).total_memory
            return cls(True, int(memory), True)
        return cls(False, int(psutil.virtual_memory().available // worker.local_world_size), cpu_has_bf16())

    @classmethod
    def poorest(cls, machines: Sequence["Machine"]) -> "Machine":
        """What every one of some ranks has."""
        return cls(
            all(machine.gpu for machine in machines),
            min(machine.memory for machine in machines),
            all(machine.bf16 for machine in machines),
        )


def settle_precision(
    precision: Literal["auto", "fp32", "bf16"], machine: Machine, saved: Precision | None = None
) -> Precision:
    """What is set; for "auto" what a checkpoint was `saved` with, else bf16 where it is the faster one."""
    if precision != "auto":
        return precision
    return saved or ("bf16" if machine.bf16 else "fp32")


def cpu_has_bf16() -> bool:
    """Whether the CPU has bf16 units (AMX or AVX-512); emulated, bf16 is several times slower than fp32."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8", errors="replace").split() if cpuinfo.exists() else []
    return "amx_bf16" in flags or "avx512_bf16" in flags


def state_bytes(config: VitConfig, precision: Precision, zero_stage: int, ranks: int, averages: bool = False) -> float:
    """Bytes a rank for weights, gradients and AdamW's states (ZeRO, arXiv 1910.02054, section 3.1).

    A parameter takes 2 + 4 + 12 bytes in bf16 (fp32 gradient accumulation, fp32 master weights and two
    moments) and 4 + 4 + 8 in fp32; stage 1 shards the last of them, 2 the gradients too, 3 all. An average of the
    weights takes 4 more, sharded like the moments.
    """
    weight, gradient, optimizer = (2, 4, 12) if precision == "bf16" else (4, 4, 8)
    optimizer += 4 if averages else 0
    share = [1.0 / ranks if zero_stage >= stage else 1.0 for stage in (3, 2, 1)]
    return count_parameters(config) * (weight * share[0] + gradient * share[1] + optimizer * share[2])


def saved_bytes(config: VitConfig, ranks: int, averages: bool) -> float:
    """Bytes a rank for its part of a checkpoint: fp32 weights, AdamW's two moments and, if kept, the average."""
    return count_parameters(config) * 4 * (4 if averages else 3) / ranks


def package_bytes(config: VitConfig) -> float:
    """Bytes of the weights in a model's package: fp32."""
    return count_parameters(config) * 4


def activation_bytes(config: VitConfig, precision: Precision, recompute: bool) -> float:
    """Bytes an image that a forward pass keeps for the backward pass, with attention that stores no matrix.

    N (16 D + 4 M) bytes a block in bf16 (twice that in fp32) for N tokens of width D and MLPs of width M; with
    recomputation only each block's input, and one block at a time in full.
    """
    scale = 1 if precision == "bf16" else 2
    block = scale * config.tokens * (16 * config.width + 4 * config.mlp_dim)
    if config.dropout:
        block += config.tokens * (2 * config.width + config.mlp_dim)  # which units were dropped, a byte each
    if recompute:
        return config.depth * scale * 2 * config.tokens * config.width + block
    return config.depth * block


def _micro_batches(share: int, pairs: bool) -> list[int]:
    """The micro-batches that a rank's share of the global batch splits into, ascending."""
    return [size for size in _divisors(share) if not pairs or size % 2 == 0]


def _divisors(number: int) -> list[int]:
    small = [candidate for candidate in range(1, math.isqrt(number) + 1) if number % candidate == 0]
    return sorted({*small, *(number // candidate for candidate in small)})


def _some(numbers: list[int], near: int) -> str:
    """The few of `numbers` that are nearest to `near`, for a message."""
    chosen = sorted(sorted(numbers, key=lambda number: abs(number - near))[:6])
    return " or ".join([", ".join(map(str, chosen[:-1])), str(chosen[-1])]) if len(chosen) > 1 else str(chosen[0])
