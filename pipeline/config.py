"""The settings of the training stages. A recipe is a YAML file of these keys; see `pipeline/recipes/`.

Every section is checked by itself when it is read, and sections against each other by `StageSettings`; what
needs the corpus (epochs to steps) or the cluster (ranks) is checked by the stage before it starts a worker.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, model_validator

from cluster.settings import Settings, SettingsError, refuse_unread
from pipeline.data_config import DataSettings
from pipeline.model_config import ModelSettings, Probability

_UNITS = ("steps", "epochs", "images")
MOST_SECONDS = 10**9
_LONGEST_DURATION, _LARGEST_DURATION = 60, 1e15
"""Characters of a duration, and its number."""


def _says_unit(value: object) -> object:
    """Refuse a number of nothing, with what it may have meant."""
    if type(value) in (int, float) and 0 < value < _LARGEST_DURATION:  # type: ignore[operator]
        raise ValueError(f'{value} of what? Write "{value} epochs", "{value} steps" or "{value} images"')
    return value


def _check_duration(text: str) -> str:
    _split_duration(text)
    return text


def _split_duration(text: str) -> tuple[float, str]:
    form = r"\s*(\d{1,3}(?:,\d{3})+|\d[\d_]*\.?\d*|\.\d+)\s*([kKMG]?)\s*(\w+)\s*"
    match = re.fullmatch(form, text) if len(text) <= _LONGEST_DURATION else None
    unit = match and (match[3] if match[3].endswith("s") else match[3] + "s")
    if not match or unit not in _UNITS:
        shown = repr(text[:_LONGEST_DURATION])
        raise ValueError(f'{shown} is not a duration: write "90 epochs", "10k steps" or "300M images"')
    scale = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}[match[2]]
    value = float(re.sub("[_,]", "", match[1])) * scale
    if value > _LARGEST_DURATION:
        raise ValueError(f"{text!r} is longer than anything that could be trained")
    return value, str(unit)


def _check_length(text: str) -> str:
    if _split_duration(text)[0] == 0:
        raise ValueError(f"{text!r} must be longer than nothing")
    return text


Duration = Annotated[str, BeforeValidator(_says_unit), AfterValidator(_check_duration)]
"""A length of training in steps, epochs or images: "10k steps", "90 epochs", "300M images"."""

Length = Annotated[str, BeforeValidator(_says_unit), AfterValidator(_check_length)]
"""A `Duration` that is not 0."""


_SHARE = re.compile(r"\s*(\d{1,3}(?:\.\d+)?|\.\d+)\s*%\s*")


def _check_piece(text: str) -> str:
    if "%" not in text:
        try:
            return _check_duration(text)
        except ValueError as error:
            raise ValueError(f'{error}, or "5 %" of the run') from None
    match = _SHARE.fullmatch(text[:_LONGEST_DURATION])
    if not match or float(match[1]) > 100:
        raise ValueError(f'{text[:_LONGEST_DURATION]!r} is no share of a run: write "5 %", or 100 % at most')
    return text


Piece = Annotated[str, BeforeValidator(_says_unit), AfterValidator(_check_piece)]
"""A part of a run: a `Duration`, or a share of the run ("5 %")."""


def _check_range(text: str) -> str:
    match = re.fullmatch(r"([1-9]\d{0,5})-([1-9]\d{0,5})", text)
    if not match or int(match[1]) > int(match[2]):
        raise ValueError(f'{text!r} is no number of ranks: write 8, or "4-16" for at least 4 and at most 16')
    return text


WorkerRange = Annotated[str, AfterValidator(_check_range)]
"""Fewest and most ranks, such as "4-16"."""


def duration_in_steps(text: str, global_batch: int, num_samples: int) -> int:
    """A duration as optimizer steps, rounded to the nearest (at least 1 where the duration is not 0).

    Args:
        text: a `Duration`.
        global_batch: images an optimizer step.
        num_samples: images an epoch.
    """
    value, unit = _split_duration(text)
    steps = {
        "steps": value,
        "images": value / global_batch,
        "epochs": value * num_samples / global_batch,
    }[unit]
    return max(round(steps), 1 if value > 0 else 0)


def piece_in_steps(text: str, total: int, global_batch: int, num_samples: int) -> int:
    """A `Piece` of a run of `total` optimizer steps, rounded to the nearest step; the others as duration_in_steps."""
    share = _SHARE.fullmatch(text)
    if share is None:
        return duration_in_steps(text, global_batch, num_samples)
    return round(total * float(share[1]) / 100)


_SECONDS = {
    "d": 86400, "day": 86400, "h": 3600, "hour": 3600, "min": 60, "minute": 60, "s": 1, "sec": 1, "second": 1,
}  # fmt: skip


def seconds_of(text: str) -> float:
    """The seconds of a time as people write it: "11 h 30 min", "90 min", "45 s", "1.5 h", "2 d".

    Raises:
        ValueError: it is not one, or not more than zero.
    """
    pieces = re.findall(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text)
    units = [unit if unit in _SECONDS else unit.removesuffix("s") for _, unit in pieces]
    rest = re.sub(r"\d+(?:\.\d+)?\s*[a-z]+", "", text).strip()
    known = bool(pieces) and not rest and all(unit in _SECONDS for unit in units)
    seconds = (
        sum(float(number) * _SECONDS[unit] for (number, _), unit in zip(pieces, units, strict=True)) if known else 0
    )
    if not 0 < seconds <= MOST_SECONDS:
        shown = repr(text[:_LONGEST_DURATION])
        raise ValueError(f'{shown} is not a time: write "11 h 30 min", "90 min", "45 s" or "2 d"')
    return seconds


def _says_time_unit(value: object) -> object:
    if type(value) in (int, float):
        raise ValueError(f'{value} of what? Write "{value} h", "{value} min" or "{value} s"')
    return value


def _check_time(text: str) -> str:
    seconds_of(text)
    return text


RECIPES = Path(__file__).parent / "recipes"
"""The shipped recipes, in a folder for each stage."""

TimeSpan = Annotated[str, BeforeValidator(_says_time_unit), AfterValidator(_check_time)]
"""Hours, minutes and the like: "11 h 30 min"."""
Batch = Annotated[int, Field(gt=0, le=1 << 24)]
"""Images; with the bound, what goes through its divisors does not take for ever."""
Seconds = Annotated[int, Field(gt=0, le=MOST_SECONDS)]
Ranks = Annotated[int, Field(gt=0, lt=1_000_000)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


def _check_run_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        would_do = re.sub(r"[^A-Za-z0-9._-]+", "-", name[:60]).strip("-._")
        advice = f", such as {would_do}" if would_do else ""
        raise ValueError(
            f"{name[:60]!r} cannot be a run's name, which is a folder's: letters, digits, '.', '-' and '_' would do, a "
            f"letter or digit first{advice}"
        )
    return name


class LossSettings(Settings):
    """The objective."""

    kind: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: one class an image. sigmoid: many weighted labels, summed over classes, averaged over images."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread over all classes (softmax only)."""

    @model_validator(mode="after")
    def _check(self) -> "LossSettings":
        if self.kind == "sigmoid" and self.label_smoothing:
            raise SettingsError(
                f"loss.label_smoothing = {self.label_smoothing} does nothing with loss.kind = sigmoid: set it to 0"
            )
        return self


class OptimizerSettings(Settings):
    """The optimizer and its learning rate over time."""

    kind: Literal["adamw", "sgd"] = "adamw"
    """AdamW with decoupled weight decay, or SGD with momentum."""
    learning_rate: Annotated[float, Field(gt=0, le=1e30)] = 1e-3
    """Peak learning rate, reached at the end of the warm-up."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """AdamW's epsilon."""
    momentum: Momentum = 0.9
    """SGD's momentum."""
    weight_decay: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Decay of the kernels (never of biases, norms, tokens or position embedding), times the learning rate."""
    schedule: Literal["linear", "cosine", "rsqrt", "constant"] = "cosine"
    """Course of the learning rate after the warm-up: to final_learning_rate, or rsqrt with a cooldown to it."""
    warmup: Piece = "0 steps"
    """Length of the linear rise from 0; also a share of the run ("5 %")."""
    timescale: Length = "10k steps"
    """Steps after which the reciprocal square root has fallen by a factor of the square root of 2."""
    cooldown: Piece = "0 steps"
    """Length of the linear fall to final_learning_rate at the end of rsqrt or constant; also a share of the run."""
    final_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end."""
    gradient_clipping: Annotated[float, Field(ge=0, le=1e30)] = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""

    @model_validator(mode="after")
    def _check(self) -> "OptimizerSettings":
        if self.final_learning_rate > self.learning_rate:
            raise SettingsError(
                f"optimizer.final_learning_rate = {self.final_learning_rate} is above "
                f"optimizer.learning_rate = {self.learning_rate}, the peak"
            )
        if self.learning_rate * self.weight_decay >= 1:
            raise SettingsError(
                f"optimizer.learning_rate = {self.learning_rate:g} times optimizer.weight_decay = "
                f"{self.weight_decay:g} is {self.learning_rate * self.weight_decay:.3g}, the share of itself that a "
                "weight loses in a step: nothing would be left of it. Recipes have 1e-5 to 1e-3"
            )
        refuse_unread(self, "optimizer", "kind", self.kind == "adamw", ("betas", "eps"))
        refuse_unread(self, "optimizer", "kind", self.kind == "sgd", ("momentum",))
        refuse_unread(self, "optimizer", "schedule", self.schedule == "rsqrt", ("timescale",))
        refuse_unread(self, "optimizer", "schedule", self.schedule in ("rsqrt", "constant"), ("cooldown",))
        falls = self.schedule in ("linear", "cosine") or self.cooldown != "0 steps"
        refuse_unread(self, "optimizer", "schedule", falls, ("final_learning_rate",))
        return self


class TrainingSettings(Settings):
    """How long, how large, how precise, and how the work is laid out. The layout does not change the result."""

    duration: Length
    """How long to train."""
    global_batch: Batch
    """Images an optimizer step, over all ranks."""
    micro_batch: Batch | None = None
    """Images a forward pass on one rank; null takes the largest that is expected to fit."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the order, the augmentation, the initialisation and dropout."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 keeps fp32 master weights. auto: bf16 on GPUs and on CPUs with bf16 matrix units, fp32 elsewhere."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] | Literal["auto"] = "auto"
    """DeepSpeed ZeRO: 0 none, 1 shards optimizer state, 2 gradients too, 3 weights too. auto: the least that fits."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile of each block. auto: on GPUs."""
    recompute: bool = False
    """Recompute each block in the backward pass instead of storing its activations."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of an exponential moving average of the weights, which is then scored and handed over; 0 keeps none."""


HeldoutScore = Literal["heldout/top1", "heldout/top5", "heldout/loss"]
"""What a run's held-out scores are called in its metrics."""
LOWER_IS_BETTER = frozenset({"heldout/loss"})
"""Those that should fall."""


class CheckpointSettings(Settings):
    """Saving the state that training resumes from."""

    every: Length = "1000 steps"
    """How often; one is always written at the end."""
    keep: PositiveInt = 2
    """How many of the newest stay."""
    keep_every: Length | None = None
    """Those at multiples of this stay too."""
    keep_best: HeldoutScore | None = None
    """The one that scored best by this stays too (highest share, lowest loss): every step that is scored is saved."""
    scratch: str = ""
    """Folder on each node's own disk for checkpoints and packages on their way. Empty: one of this user alone in the
    system's temporary folder."""
    background: bool = True
    """Training goes on while a checkpoint is brought to the run's folder; false waits for it."""


class EvaluationSettings(Settings):
    """Scoring data.heldout."""

    every: Length | None = None
    """How often during training; null only at the end."""
    batch: Batch = 64
    """Images a forward pass on one rank."""


class EarlyStoppingSettings(Settings):
    """Ending a run whose held-out scores no longer improve. The schedule is that of the whole duration."""

    patience: PositiveInt | None = None
    """Evaluations in a row without improvement after which training ends; null trains for the whole duration."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """By how much the score must be better than the best one to be an improvement."""
    monitor: HeldoutScore = "heldout/loss"
    """The score: a share that should rise, or the loss, which should fall. With an average of the weights, its."""

    @model_validator(mode="after")
    def _check(self) -> "EarlyStoppingSettings":
        refuse_unread(self, "early_stopping", "patience", self.patience is not None, ("min_delta", "monitor"))
        return self


class LogSettings(Settings):
    """What is written while training."""

    every: PositiveInt = 10
    """Steps between log lines and metric points."""
    samples: bool = False
    """Keep a record of the sample ids of every step and rank, RUN/samples/rank-*.jsonl, to look for faults."""


class RunSettings(Settings):
    """Where the run lives and what it runs on."""

    name: Annotated[str, AfterValidator(_check_run_name)]
    """Folder of the run under HOME/runs: letters, digits, dot, dash and underscore. The same name resumes."""
    home: str = ""
    """Folder of runs, tracking database and artifacts. Empty: $VITFORGE_HOME, else ~/vitforge."""
    workers: Ranks | WorkerRange | None = None
    """Ranks, or fewest and most of them ("4-16": as many as there is room for). Null: every GPU, or 1 without one."""
    cpus_per_worker: Annotated[int, Field(gt=0, le=4096)] | None = None
    """Ray's logical CPUs a rank; null shares the cluster's among the ranks."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Crashes in a row, without a new checkpoint between them, that Ray starts the ranks again after."""
    wait_s: Annotated[int, Field(ge=0, le=MOST_SECONDS)] = 1800
    """Seconds to wait for room on the cluster: for other jobs to end, or after a node was lost."""
    resize_check_s: Seconds = 60
    """Seconds between looks for room for more ranks, where run.workers allows more than there are."""
    hang_timeout_s: Seconds = 300
    """Seconds without progress, or a minute without a sign of life, after which a rank hangs and all start again."""
    stop_after: TimeSpan | None = None
    """Time from the command's start ("11 h 30 min") in which it must have saved and ended, with exit status 75, as a
    queue's limit wants. It stops early enough for a save, as long as one took before. The same command goes on."""
    new_tracking: bool = False
    """Where MLflow has lost this run (its database was damaged, or somebody deleted it), go on with a new tracking run,
    which gets all of the metrics, and register the model there. Otherwise it changes nothing."""
    allow_changes: bool = False
    """Go on from a checkpoint of other settings or another corpus; never of another architecture or global batch."""
    collective_timeout_s: Seconds = 600
    """Seconds after which a collective operation that does not finish ends the ranks."""
    interface: str | None = None
    """Network interface between the ranks, such as ib0; null takes the one that reaches the other machines."""

    @property
    def worker_bounds(self) -> tuple[int, int] | None:
        """Fewest and most ranks; None where the cluster decides."""
        if isinstance(self.workers, str):
            fewest, most = map(int, self.workers.split("-"))
            return fewest, most
        return None if self.workers is None else (self.workers, self.workers)


class HealthSettings(Settings):
    """What happens when training goes wrong."""

    nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop, or go back to the last checkpoint and on without that batch."""
    spike_factor: Annotated[float, Field(gt=1, le=1e9)] | None = None
    """A loss so many times its median over the last 200 steps is a spike; null looks for none."""
    spike: Literal["stop", "skip"] = "skip"
    """What is done about a spike; as nonfinite."""
    max_skips: PositiveInt = 10
    """Batches that a run may leave out."""

    @model_validator(mode="after")
    def _check(self) -> "HealthSettings":
        refuse_unread(self, "health", "spike_factor", self.spike_factor is not None, ("spike",))
        skips = self.nonfinite == "skip" or (self.spike_factor is not None and self.spike == "skip")
        refuse_unread(self, "health", "nonfinite", skips, ("max_skips",))
        return self


class RegistrySettings(Settings):
    """The hand-over to the MLflow model registry."""

    name: str | None = None
    """Registered model; null does not register."""
    alias: str | None = None
    """Alias that is moved to the new version, such as champion."""
    checkpoint: Literal["last", "best"] = "last"
    """Which one is handed over: the last, or the best of those that checkpoint.keep_best keeps."""

    @model_validator(mode="after")
    def _check(self) -> "RegistrySettings":
        refuse_unread(self, "registry", "name", self.name is not None, ("checkpoint",))
        if self.alias is not None and self.name is None:
            raise SettingsError(
                f"registry.alias = {self.alias!r} needs registry.name, the registered model it points at"
            )
        return self


class StageSettings(Settings):
    """What pre-training and fine-tuning share."""

    data: DataSettings
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSettings
    training: TrainingSettings
    checkpoint: CheckpointSettings = CheckpointSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    early_stopping: EarlyStoppingSettings = EarlyStoppingSettings()
    log: LogSettings = LogSettings()
    health: HealthSettings = HealthSettings()
    run: RunSettings
    registry: RegistrySettings = RegistrySettings()

    @model_validator(mode="after")
    def _check_sections(self) -> "StageSettings":
        if self.evaluation.every is not None and self.data.heldout is None:
            raise SettingsError(
                f"evaluation.every = {self.evaluation.every!r} has nothing to score: set data.heldout to a corpus"
            )
        if self.checkpoint.keep_best is not None and self.data.heldout is None:
            raise SettingsError(
                f"checkpoint.keep_best = {self.checkpoint.keep_best!r} has no scores to go by: set data.heldout"
            )
        if self.registry.checkpoint == "best" and self.checkpoint.keep_best is None:
            raise SettingsError(
                "registry.checkpoint = 'best' needs checkpoint.keep_best, the score that it is best by: heldout/top1, "
                "heldout/top5 or heldout/loss"
            )
        if self.early_stopping.patience is not None and self.evaluation.every is None:
            raise SettingsError(
                f"early_stopping.patience = {self.early_stopping.patience} counts evaluations, of which there is one, "
                'at the end: set evaluation.every, such as "1 epochs"'
            )
        if self.data.heldout is None and self.evaluation.batch != EvaluationSettings().batch:
            raise SettingsError("evaluation.batch has no effect without data.heldout: set that, or take it out")
        if self.data.augment.mixes and self.training.global_batch % 2:
            raise SettingsError(
                f"training.global_batch = {self.training.global_batch} must be even: data.augment.mixup and cutmix "
                "mix pairs"
            )
        return self


class PretrainSettings(StageSettings):
    """Settings of `pipeline/pretrain.py`."""

    model: ModelSettings = ModelSettings()


class FinetuneSettings(StageSettings):
    """Settings of `pipeline/finetune.py`. The architecture comes with the model."""

    parent: str
    """The model to start from: models:/NAME@ALIAS, models:/NAME/VERSION or a package's folder."""
    position_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How the position embedding is resized: bilinear with aligned corners (paper's code), or bicubic (DeiT, timm)."""
    position_antialias: bool = False
    """Antialiasing of that, where the grid shrinks; bicubic only (timm's resampling has it)."""
    dropout: Probability = 0.0
    """Dropout while fine-tuning."""
    drop_path: Probability = 0.0
    """Stochastic depth while fine-tuning."""

    @model_validator(mode="after")
    def _check_position(self) -> "FinetuneSettings":
        if self.position_antialias and self.position_interpolation != "bicubic":
            raise SettingsError(
                "position_antialias = true goes with position_interpolation = 'bicubic' only: set that, or take it out"
            )
        return self


class EvaluateSettings(Settings):
    """Settings of `pipeline/evaluate.py`."""

    model: str
    """The model to score: models:/NAME@ALIAS, models:/NAME/VERSION or a package's folder."""
    corpus: str
    """Folder of the corpus to score it on."""
    batch: Batch = 64
    """Images a forward pass on one rank."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, as consumers of the registry compute, or bf16."""
    decode: Literal["auto", "cpu", "gpu"] = "auto"
    """Where DALI decodes; auto tries the GPU in a subprocess first and falls back to the CPU."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Share of images that may be unreadable; they are left out and counted. More (and more than 10) are an error."""
    cache_gb: Annotated[float, Field(gt=0, le=1e9)] = 100.0
    """What shards from s3:// may take on a node, in $VITFORGE_CACHE or ~/.cache/vitforge; at most 80 % of the disk."""
    workers: Ranks | None = None
    """Ranks; null takes every GPU of the cluster, or 1 where there is none."""
    cpus_per_worker: Annotated[int, Field(gt=0, le=4096)] | None = None
    """Ray's logical CPUs a rank; null shares the cluster's among the ranks."""
    max_failures: Annotated[int, Field(ge=0)] = 1
    """Crashes of the ranks after which Ray starts them again."""
    wait_s: Annotated[int, Field(ge=0, le=MOST_SECONDS)] = 1800
    """Seconds to wait for room on the cluster: for other jobs to end, or for an autoscaler's nodes."""
    interface: str | None = None
    """Network interface between the ranks, such as ib0; null takes the one that reaches the other machines."""
    home: str = ""
    """Folder of runs, tracking database and artifacts. Empty: $VITFORGE_HOME, else ~/vitforge."""
