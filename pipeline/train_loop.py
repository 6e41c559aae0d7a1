"""The training loop, from top to bottom. It knows nothing of Ray: whoever starts the ranks calls `train`.

One optimizer step: every rank takes its slice of the step's positions of the corpus order, micro-batch by
micro-batch; DALI decodes and augments; the loss goes backward; DeepSpeed reduces, clips and updates. Nothing
but the step decides what happens in it, so that a restart continues as if it had never stopped.
"""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.command import duration, log, set_up_logging
from data_prep.corpus import Corpus
from models.losses import dense_targets, sigmoid_cross_entropy, softmax_cross_entropy
from models.presets import train_flops
from models.vit import VisionTransformer, VitConfig
from models.weights import load_into, load_safetensors
from pipeline import augment, checkpoints, decoding, layout, pictures, throughput, tracking, workers
from pipeline.config import StageSettings, duration_in_steps
from pipeline.engine import build_engine, prepare_deepspeed, set_learning_rate
from pipeline.engine import step as engine_step
from pipeline.loader import Batch, EvalLoader, TrainLoader
from pipeline.schedules import Schedule
from pipeline.scoring import score

METRICS = "metrics.jsonl"
"""The record of a run's metrics, in its folder; it appears when the first step is about to be taken."""


@dataclass(frozen=True)
class Job:
    """What the ranks are told. It travels to other machines, so it holds plain values only."""

    settings: StageSettings
    architecture: dict[str, Any]
    """The model, as `VitConfig.to_json` gives it."""
    folder: str
    """The run's folder, which every rank sees."""
    initial_weights: str | None
    """Safetensors file to start from; None draws them from the seed."""
    tracking_home: str
    mlflow_run: str


class NonFiniteLossError(ValueError):
    """The loss became infinite or not a number."""


def train(job: Job) -> None:
    """Train one model to the end of its duration, from its newest checkpoint if it has one. Every rank calls it.

    Raises:
        ValueError: what the user can put right, with what would do.
        NonFiniteLossError: naming step, rank and samples.
    """
    settings, folder = job.settings, Path(job.folder)
    training, data = settings.training, settings.data

    # ---- ranks -----------------------------------------------------------------------------------------------
    set_up_logging()
    prepare_deepspeed()
    worker = workers.join(settings.run.collective_timeout_s)
    if not worker.leads:
        log.setLevel("ERROR")
    _check_shared_folder(folder, worker)

    # ---- data ------------------------------------------------------------------------------------------------
    corpus = Corpus.open(data.corpus)
    heldout = Corpus.open(data.heldout) if data.heldout else None
    backend = decoding.choose_backend(data.decode, worker.gpu)

    # ---- model and engine ------------------------------------------------------------------------------------
    config = VitConfig.from_json(job.architecture)
    resume = checkpoints.newest(folder / "checkpoints")
    stage = resume.state["zero_stage"] if resume else None
    memory = layout.device_memory(worker.gpu, worker.local_world_size)
    plan = layout.settle(settings, config, worker.world_size, worker.gpu, memory, stage)
    identity = {
        "architecture": config.to_json(),
        "corpus_hash": corpus.corpus_hash,
        "settings": settings_that_decide(settings),
        "world_size": worker.world_size,
        "zero_stage": plan.zero_stage,
        "precision": plan.precision,
    }
    if resume:
        checkpoints.check_resumable(resume, identity)
    torch.manual_seed(training.seed)
    model = VisionTransformer(config)
    if job.initial_weights:
        load_into(model, load_safetensors(Path(job.initial_weights)))
    engine = build_engine(model, settings.optimizer, plan, training.global_batch, worker)
    start = 0
    if resume:
        checkpoints.load(engine, resume)
        start = resume.step
        log.info("resumed from %s", resume.folder)

    # ---- durations -------------------------------------------------------------------------------------------
    def steps(text: str) -> int:
        return duration_in_steps(text, training.global_batch, corpus.num_samples)

    total = steps(training.duration)
    rate_of = Schedule(settings.optimizer, total, training.global_batch, corpus.num_samples)
    checkpoint_every = steps(settings.checkpoint.every)
    evaluate_every = steps(settings.evaluation.every) if settings.evaluation.every else None

    # ---- what is written -------------------------------------------------------------------------------------
    run, metrics_file = None, None
    if worker.leads:
        tracking.connect(Path(job.tracking_home))
        run = tracking.Run("", job.mlflow_run)
        metrics_file = tracking.MetricsFile(folder / METRICS, start)
        run.tag("vitforge.decoder", backend)
        run.tag("vitforge.layout", str(plan))
    log.info(
        "%d steps of %d images on %d rank(s): %s, micro-batch %d x %d, ZeRO stage %d, decoding on %s, attention by %s",
        total,
        training.global_batch,
        worker.world_size,
        plan.precision,
        plan.micro_batch,
        plan.accumulation,
        plan.zero_stage,
        backend,
        throughput.attention_backend(config, plan, worker.device),
    )

    def save(step: int) -> None:
        samples = step * training.global_batch
        state = {
            **identity,
            "samples_consumed": samples,
            "mlflow_run": job.mlflow_run,
            "versions": checkpoints.versions(),
        }
        checkpoints.save(engine, folder / "checkpoints", step, state, worker, settings.checkpoint.keep)

    def evaluate(step: int) -> None:
        assert heldout is not None
        loader = EvalLoader(heldout, data, worker, settings.evaluation.batch, backend)
        scores = score(engine.module, loader, settings.loss.kind, plan.dtype)
        log.info(
            "step %d: held-out top-1 %.2f %%, top-5 %.2f %%, loss %.4f (%d images)",
            step,
            100 * scores.top1,
            100 * scores.top5,
            scores.loss,
            scores.images,
        )
        if run and metrics_file:
            named = {f"heldout/{key}": value for key, value in scores.as_metrics().items()}
            metrics_file.write(step, named)
            run.metrics(step, named)

    # ---- the loop --------------------------------------------------------------------------------------------
    loader = TrainLoader(
        corpus, data, training.seed, worker, training.global_batch, plan.micro_batch, start, total, backend
    )
    batches = iter(loader)
    meter = throughput.Meter(total - start, training.global_batch, train_flops(config), worker)
    losses: list[torch.Tensor] = []
    unchecked: tuple[int, torch.Tensor, Batch] | None = None
    for step in range(start, total):
        done = step + 1
        # The first step after a start shows that it goes; the record has the same steps with and without restarts.
        recorded = done % settings.log.every == 0 or done in (1, total)
        logged = recorded or done == start + 1
        _seed_dropout(training.seed, step, worker.rank)
        weight = augment.mixup_weight(data.mixup, training.seed, step) if data.mixup else None
        set_learning_rate(engine, rate_of(step))
        for _ in range(plan.accumulation):
            with meter.waiting():
                batch = next(batches)
            if step == 0 and worker.leads and run and not losses:
                _show_batch(batch, corpus, settings, folder, run)
            images = batch.images.to(plan.dtype)
            targets = dense_targets(
                batch.rows, batch.classes, batch.weights, len(images), config.num_classes, worker.device
            )
            if weight is not None:
                images, targets = mix_pairs(images, weight), mix_pairs(targets, weight)
            logits = engine(images)
            if settings.loss.kind == "softmax":
                loss = softmax_cross_entropy(logits, targets, settings.loss.label_smoothing)
            else:
                loss = sigmoid_cross_entropy(logits, targets)
            if not worker.gpu:
                _check_finite(step, loss, batch, worker)
            engine.backward(loss)
            norm = engine_step(engine, measure=logged)
            # On a GPU the value is not there yet: it is looked at when the next batch is under way.
            if unchecked:
                _check_finite(*unchecked, worker)
            unchecked = (step, loss.detach(), batch) if worker.gpu else None
            losses.append(loss.detach())
        if logged:
            mean_loss = _mean_over_ranks(losses)
            assert norm is not None
            values = {
                "loss": mean_loss,
                "learning_rate": rate_of(step),
                "gradient_norm": norm,
                **meter.measure(done - start),
            }
            if not math.isfinite(mean_loss):
                raise NonFiniteLossError(f"the loss became {mean_loss} at or shortly before step {step}")
            log.info("%s", log_line(done, total, values, meter.seconds_left(done - start)))
            if recorded:
                losses.clear()
            if run and metrics_file and recorded:
                metrics_file.write(done, {**values, "samples": done * training.global_batch})
                run.metrics(done, {f"train/{key}": value for key, value in values.items()})
        if done % checkpoint_every == 0 or done == total:
            if unchecked:
                _check_finite(*unchecked, worker)
            with meter.paused():
                save(done)
            losses.clear()  # so that a restart from here averages over the same steps
        if heldout is not None and done != total and evaluate_every and done % evaluate_every == 0:
            with meter.paused():
                evaluate(done)
    if heldout is not None and start < total:
        evaluate(total)

    # ---- the end ---------------------------------------------------------------------------------------------
    if run:
        curves = folder / "curves.png"
        pictures.draw_curves(tracking.read_metrics(folder / METRICS), curves)
        run.artifact(curves)
        run.flush()
    engine.destroy()
    dist.barrier()
    if start < total:
        log.info("trained %d steps in %s", total - start, duration(meter.elapsed()))


def mix_pairs(values: torch.Tensor, weight: float) -> torch.Tensor:
    """Mixup of neighbours: row 2i with row 2i+1 and the other way round; [B, ...] with an even B.

    Partners are neighbours in the global order (position p with p xor 1), so that they are the same pairs for
    every world size and micro-batch.
    """
    pairs = values.reshape(len(values) // 2, 2, *values.shape[1:])
    return (weight * pairs + (1 - weight) * pairs.flip(1)).reshape(values.shape)


def settings_that_decide(settings: StageSettings) -> dict[str, Any]:
    """The settings that change what a run computes; a run continues only with the same ones."""
    values = settings.model_dump(mode="json")
    for section in ("checkpoint", "evaluation", "log", "run", "registry"):
        del values[section]
    for key in ("corpus", "heldout", "decode", "decode_threads"):
        del values["data"][key]
    for key in ("micro_batch", "zero_stage", "precision", "compile", "recompute"):
        del values["training"][key]
    return values


def log_line(step: int, total: int, values: dict[str, float], seconds_left: float) -> str:
    """What a practitioner looks for, on one line."""
    parts = [
        f"step {step:,}/{total:,}",
        f"loss {values['loss']:.4f}",
        f"lr {values['learning_rate']:.2e}",
        f"grad norm {values['gradient_norm']:.3g}",
        f"{values['images_per_second']:,.0f} images/s",
    ]
    if "mfu" in values:
        parts.append(f"MFU {100 * values['mfu']:.1f} %")
    parts.append(f"data wait {100 * values['data_wait']:.1f} %")
    if step < total:
        parts.append(f"{duration(seconds_left)} left")
    return ", ".join(parts)


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    """Dropout and stochastic depth start each step from a state that only seed, step and rank decide."""
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xC2B2AE3D27D4EB4F + rank * 0x165667B19E3779F9) % 2**63)


def _check_finite(step: int, loss: torch.Tensor, batch: Batch, worker: workers.Worker) -> None:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NonFiniteLossError(
            f"the loss became {value} at step {step} on rank {worker.rank}, samples {batch.ids.tolist()}: the last "
            "checkpoint is from before it. A lower optimizer.learning_rate, a longer optimizer.warmup or "
            "optimizer.gradient_clipping=1.0 would do; look at those samples too"
        )


def _mean_over_ranks(losses: list[torch.Tensor]) -> float:
    mean = torch.stack(losses).double().mean()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


def _check_shared_folder(folder: Path, worker: workers.Worker) -> None:
    """Every rank must see the run's folder: checkpoints are written there by all of them."""
    token = [f"{time.time_ns()}" if worker.leads else None]
    marker = folder / ".shared"
    if worker.leads:
        marker.write_text(str(token[0]))
    if worker.world_size > 1:
        dist.broadcast_object_list(token)
    seen = [marker.exists() and marker.read_text() == token[0]]
    everyone: list[list[bool]] = [[False]] * worker.world_size
    if worker.world_size > 1:
        dist.all_gather_object(everyone, seen)
    else:
        everyone = [seen]
    blind = [rank for rank, (sees,) in enumerate(everyone) if not sees]
    if blind:
        raise ValueError(
            f"the run's folder {folder} is not shared: rank(s) {', '.join(map(str, blind))} do not see what rank 0 "
            "wrote there. Set run.home (or VITFORGE_HOME) to a folder that every node mounts"
        )


def _show_batch(batch: Batch, corpus: Corpus, settings: StageSettings, folder: Path, run: tracking.Run) -> None:
    names = [""] * len(batch.images)
    for row, label in zip(batch.rows, batch.classes, strict=True):
        names[int(row)] = names[int(row)] or corpus.classes[int(label)]
    path = folder / "first_batch.png"
    assert settings.data.mean is not None
    assert settings.data.std is not None
    pictures.draw_batch(batch.images, settings.data.mean, settings.data.std, names, path)
    run.artifact(path)


if __name__ == "__main__":
    sys.exit("this module is started by pipeline/pretrain.py and pipeline/finetune.py")
