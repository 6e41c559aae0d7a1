"""How a run is laid out on its ranks: precision, micro-batch, accumulation, ZeRO stage.

The layout changes speed and memory, not which samples an optimizer step uses. Memory formulae: see
`state_bytes` and `activation_bytes`.
"""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from cluster.settings import SettingsError
from models.presets import count_parameters
from models.vit import VitConfig
from pipeline.config import StageSettings

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
        pairs: images mix in pairs (mixup), so that a micro-batch must be even.

    Raises:
        SettingsError: naming the ranks or micro-batches that would do.
    """
    if global_batch % ranks:
        raise SettingsError(
            f"training.global_batch = {global_batch} does not split over {ranks} ranks: use run.workers = "
            f"{_some(_divisors(global_batch), ranks)}, or a global batch that is a multiple of {ranks}"
        )
    share = global_batch // ranks
    fitting = [size for size in _divisors(share) if not pairs or size % 2 == 0]
    if not fitting:
        raise SettingsError(
            f"training.global_batch = {global_batch} gives each of {ranks} ranks {share} images; data.mixup mixes "
            "pairs and needs an even number"
        )
    if micro_batch is not None and micro_batch not in fitting:
        mixing = " into pairs for data.mixup" if pairs and share % micro_batch == 0 else ""
        raise SettingsError(
            f"training.micro_batch = {micro_batch} does not split the {share} images of a rank "
            f"(training.global_batch = {global_batch} over {ranks} ranks){mixing}: use {_some(fitting, micro_batch)}"
        )


def settle(
    settings: StageSettings, config: VitConfig, ranks: int, gpu: bool, device_memory: int, stage: int | None = None
) -> Layout:
    """Fill in what the settings leave open.

    Args:
        ranks: world size.
        gpu: whether ranks compute on GPUs.
        device_memory: bytes that one rank may use.
        stage: ZeRO stage of the checkpoint that is resumed; takes the place of "auto".

    Raises:
        SettingsError: the batch does not split, or the model does not fit at any stage.
    """
    training = settings.training
    pairs = settings.data.mixup > 0
    check_batch(training.global_batch, training.micro_batch, ranks, pairs)
    precision = settle_precision(training.precision, gpu)
    share = training.global_batch // ranks
    budget = USABLE_MEMORY * device_memory
    smallest = training.micro_batch or min(s for s in _divisors(share) if not pairs or s % 2 == 0)

    def fits(zero_stage: int, micro_batch: int) -> bool:
        needed = state_bytes(config, precision, zero_stage, ranks)
        return needed + micro_batch * activation_bytes(config, precision, training.recompute) <= budget

    if training.zero_stage != "auto":
        zero_stage = training.zero_stage
    elif stage is not None:
        zero_stage = stage
    else:
        # bf16 weights get their fp32 gradient accumulation from stage 1 on; on one rank it shards nothing.
        least = 1 if precision == "bf16" else 0
        candidates = range(least, 4 if ranks > 1 else least + 1)
        fitting = [candidate for candidate in candidates if fits(candidate, smallest)]
        if not fitting:
            needed = state_bytes(config, precision, 3 if ranks > 1 else least, ranks) / 2**30
            images = smallest * activation_bytes(config, precision, training.recompute) / 2**30
            raise SettingsError(
                f"the model needs about {needed:.1f} GiB a rank for its states and {images:.1f} GiB for "
                f"{smallest} images, at the highest ZeRO stage; {budget / 2**30:.1f} GiB can be used. More ranks, "
                "training.recompute=true or a smaller training.micro_batch would do; training.zero_stage=3 skips "
                "this estimate"
            )
        zero_stage = fitting[0]
    micro_batch = training.micro_batch
    if micro_batch is None:
        sizes = [size for size in _divisors(share) if not pairs or size % 2 == 0]
        sizes = [size for size in sizes if gpu or size <= LARGEST_CPU_MICRO_BATCH] or sizes[:1]
        micro_batch = max((size for size in sizes if fits(zero_stage, size)), default=sizes[0])
    compiled = gpu if training.compile == "auto" else training.compile
    return Layout(precision, micro_batch, share // micro_batch, zero_stage, compiled, training.recompute)


def settle_precision(precision: Literal["auto", "fp32", "bf16"], gpu: bool) -> Precision:
    """bf16 on GPUs and on CPUs with bf16 matrix units, fp32 elsewhere, unless one of them is named."""
    if precision != "auto":
        return precision
    return "bf16" if gpu or cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies matrices in bf16 by itself (AMX); emulated, bf16 is several times slower."""
    cpuinfo = Path("/proc/cpuinfo")
    return platform.machine() == "x86_64" and cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text()


def device_memory(gpu: bool, local_ranks: int) -> int:
    """Bytes that one rank may use: its GPU's memory, or its share of what the machine has free."""
    if gpu:
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return int(psutil.virtual_memory().available // local_ranks)


def state_bytes(config: VitConfig, precision: Precision, zero_stage: int, ranks: int) -> float:
    """Bytes a rank for weights, gradients and AdamW's states (ZeRO, arXiv 1910.02054, section 3.1).

    A parameter takes 2 + 4 + 12 bytes in bf16 (fp32 gradient accumulation, fp32 master weights and two
    moments) and 4 + 4 + 8 in fp32; stage 1 shards the last of them, 2 the gradients too, 3 all.
    """
    weight, gradient, optimizer = (2, 4, 12) if precision == "bf16" else (4, 4, 8)
    share = [1.0 / ranks if zero_stage >= stage else 1.0 for stage in (3, 2, 1)]
    return count_parameters(config) * (weight * share[0] + gradient * share[1] + optimizer * share[2])


def activation_bytes(config: VitConfig, precision: Precision, recompute: bool) -> float:
    """Bytes an image that a forward pass keeps for the backward pass, with attention that stores no matrix.

    N (16 D + 4 M) bytes a block in bf16 (twice that in fp32) for N tokens of width D and MLPs of width M; with
    recomputation only each block's input, and one block at a time in full.
    """
    scale = 1 if precision == "bf16" else 2
    block = scale * config.tokens * (16 * config.width + 4 * config.mlp_dim)
    if recompute:
        return config.depth * scale * 2 * config.tokens * config.width + block
    return config.depth * block


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _some(numbers: list[int], near: int) -> str:
    """The few of `numbers` that are nearest to `near`, for a message."""
    chosen = sorted(sorted(numbers, key=lambda number: abs(number - near))[:6])
    return " or ".join([", ".join(map(str, chosen[:-1])), str(chosen[-1])]) if len(chosen) > 1 else str(chosen[0])
