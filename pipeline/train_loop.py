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

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from cluster.command import duration, log, set_up_logging
from cluster.folders import folder_at
from data_prep.mixture import Mixture
from models.losses import dense_targets, sigmoid_cross_entropy, softmax_cross_entropy
from models.presets import train_flops
from models.vit import VisionTransformer, VitConfig
from models.weights import load_into, load_safetensors
from pipeline import augment, checkpoints, decoding, layout, pictures, pixels, throughput, tracking, workers
from pipeline.config import StageSettings, duration_in_steps
from pipeline.corpora import describe_order, open_corpora, shuffle_windows
from pipeline.elastic import swap_average
from pipeline.engine import build_engine, nonfinite_flag, prepare_deepspeed, reduce_and_update, set_learning_rate
from pipeline.loader import Batch, EvalLoader, TrainLoader, check_bad
from pipeline.optimizer import averaging_decay
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
    tracking_uri: str
    mlflow_run: str


class NonFiniteError(ValueError):
    """The loss or the gradient became infinite or not a number."""


def train(job: Job) -> None:
    """Train one model to the end of its duration, from its newest checkpoint if it has one. Every rank calls it.

    Raises:
        ValueError: what the user can put right, with what would do.
        NonFiniteError: naming step, rank and samples.
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
    # The driver checked the content of the index; here the sizes do.
    corpus, heldout = open_corpora(data, check="sizes")
    verdict = decoding.Verdict.for_all(workers.from_all(decoding.choose_backend(data, worker.gpu)))
    backend = verdict.backend

    # ---- model and engine ------------------------------------------------------------------------------------
    config = VitConfig.from_json(job.architecture)
    # One rank's view of the disk and of the machines is everybody's: all must come to the same decisions.
    every = settings.checkpoint.keep_every
    keep_every = duration_in_steps(every, training.global_batch, corpus.num_samples) if every else None
    place = folder_at(job.folder, "run.home").child("checkpoints")
    saved = checkpoints.Checkpoints(place, settings.checkpoint, worker, keep_every)
    resume = saved.newest()
    machine = layout.Machine.poorest(workers.from_all(layout.Machine.here(worker)))
    plan = layout.settle(settings, config, worker.world_size, machine, resume.state if resume else None)
    identity = {**identity_of(settings, config, corpus), "precision": plan.precision}

    def check(checkpoint: checkpoints.Checkpoint) -> None:
        checkpoints.check_resumable(checkpoint, identity, settings.run.allow_changes)

    if resume:
        check(resume)
    torch.manual_seed(training.seed)
    model = VisionTransformer(config)
    if job.initial_weights:
        load_into(model, load_safetensors(Path(job.initial_weights)))
    engine = build_engine(model, settings.optimizer, plan, training.global_batch, worker, averages=training.ema > 0)
    start = saved.load(engine, resume, check).step if resume else 0

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
        tracking.connect(Path(job.tracking_home), job.tracking_uri)
        run = tracking.Run("", job.mlflow_run)
        metrics_file = tracking.MetricsFile(folder / METRICS, start)
        run.catch_up(tracking.read_metrics(folder / METRICS))
        run.tag("vitforge.decoder", f"{backend}: {verdict.why}")
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

    scored: dict[int, dict[str, float]] = {}

    def save(step: int) -> None:
        samples = step * training.global_batch
        state = {
            **identity,
            "world_size": worker.world_size,
            "zero_stage": plan.zero_stage,
            "resolved_settings": settings.model_dump(mode="json"),
            "decoder": backend,
            "micro_batch": plan.micro_batch,
            "samples_consumed": samples,
            "mlflow_run": job.mlflow_run,
            "versions": checkpoints.versions(),
            "scores": scored.get(step, {}),
        }
        saved.save(engine, step, state)
        if run:
            run.flush()

    def evaluate(step: int) -> None:
        assert heldout is not None
        loader = EvalLoader(heldout, data, worker, settings.evaluation.batch, backend)
        if training.ema:
            swap_average(engine)
        scores = score(engine.module, loader, settings.loss.kind, plan.dtype)
        if training.ema:
            swap_average(engine)
        bad = check_bad(loader, heldout.num_samples, data.max_bad_share)
        log.info(
            "step %d: held-out top-1 %.2f %%, top-5 %.2f %%, loss %.4f (%d images%s)",
            step,
            100 * scores.top1,
            100 * scores.top5,
            scores.loss,
            scores.images,
            f", {bad} bad ones left out" if bad else "",
        )
        named = {f"heldout/{key}": value for key, value in scores.as_metrics().items()}
        scored[step] = named
        if run and metrics_file:
            metrics_file.write(step, named)
            run.metrics(step, named)
            run.flush()

    # ---- the loop --------------------------------------------------------------------------------------------
    loader = TrainLoader(
        corpus, data, training.seed, worker, training.global_batch, plan.micro_batch, start, total, backend
    )
    if mixing_of_windows := describe_order(corpus, loader.order, loader.windows, training.global_batch):
        log.info("%s", mixing_of_windows)
    batches = iter(loader)
    peak = throughput.peak_flops(worker, plan.precision)
    meter = throughput.Meter(total - start, training.global_batch, train_flops(config), peak, worker.world_size)
    losses: list[torch.Tensor] = []
    unchecked: tuple[int, torch.Tensor, NDArray[np.int64]] | None = None
    for step in range(start, total):
        done = step + 1
        # The first step after a start shows that it goes; the record has the same steps with and without restarts.
        recorded = done % settings.log.every == 0 or done in (1, total)
        logged = recorded or done == start + 1
        saves = done % checkpoint_every == 0 or done == total
        due = evaluate_every is not None and done % evaluate_every == 0
        scores = heldout is not None and (due or done == total)
        step_ids: list[NDArray[np.int64]] = []
        _seed_dropout(training.seed, step, worker.rank)
        mixing = augment.draw_mixing(data.augment, training.seed, step, data.image_size)
        set_learning_rate(engine, rate_of(step), averaging_decay(training.ema, step))
        for _ in range(plan.accumulation):
            with meter.waiting():
                batch = next(batches)
            if step == 0 and worker.leads and run and not losses:
                _show_batch(batch, corpus, settings, folder, run)
            step_ids.append(batch.ids)
            images = batch.images
            targets = dense_targets(
                batch.rows, batch.classes, batch.weights, len(images), config.num_classes, worker.device
            )
            if mixing is not None:
                images, targets = pixels.mix(images, targets, mixing)
            logits = engine(images.to(plan.dtype))
            if settings.loss.kind == "softmax":
                loss = softmax_cross_entropy(logits, targets, settings.loss.label_smoothing)
            else:
                loss = sigmoid_cross_entropy(logits, targets)
            if not worker.gpu:
                _check_finite("loss", done, loss, batch.ids, worker)
            engine.backward(loss)
            norm = reduce_and_update(engine, measure=logged or saves)
            # On a GPU the value is not there yet: it is looked at when the next batch is under way.
            if unchecked:
                _check_finite("loss", *unchecked, worker)
            unchecked = (done, loss.detach(), batch.ids) if worker.gpu else None
            losses.append(loss.detach())
        if logged or saves:
            if unchecked:
                _check_finite("loss", *unchecked, worker)
                unchecked = None
            assert norm is not None
            _check_finite("gradient norm", done, torch.tensor(norm), np.concatenate(step_ids), worker)
            _check_skipped(engine, done)
        if logged:
            assert norm is not None
            values = {
                "loss": _mean_over_ranks(losses),
                "learning_rate": rate_of(step),
                "gradient_norm": norm,
                **meter.measure(done - start),
            }
            if bad := check_bad(loader, (done - start) * training.global_batch, data.max_bad_share):
                values["bad_samples"] = bad
            log.info("%s", log_line(done, total, values, meter.seconds_left(done - start)))
            if recorded:
                losses.clear()
            if run and metrics_file and recorded:
                metrics_file.write(done, values)
                run.metrics(done, {tracking.metric_name(key): value for key, value in values.items()})
        if scores:
            # Before the checkpoint: a restart from it must not find the scores missing.
            with meter.paused():
                evaluate(done)
        if saves:
            with meter.paused():
                save(done)
            losses.clear()  # so that a restart from here averages over the same steps
    if heldout is not None and start >= total:
        evaluate(total)

    # ---- the end ---------------------------------------------------------------------------------------------
    saved.wait()
    saved.close()
    if run:
        run.flush()
    engine.destroy()
    dist.barrier()
    if start < total:
        log.info("trained %d steps in %s", total - start, duration(meter.elapsed()))


def identity_of(settings: StageSettings, config: VitConfig, corpus: Mixture) -> dict[str, Any]:
    """What must be the same for a run to go on from a checkpoint, whatever it runs on."""
    decide = settings_that_decide(settings)
    decide["data"]["shuffle_window"] = shuffle_windows(corpus, settings.data)
    return {"architecture": config.to_json(), "corpus_hash": corpus.corpus_hash, "settings": decide}


def settings_that_decide(settings: StageSettings) -> dict[str, Any]:
    """The settings that change what a run computes; a run continues only with the same ones."""
    values = settings.model_dump(mode="json")
    for section in ("checkpoint", "evaluation", "log", "run", "registry"):
        del values[section]
    for key in (
        "corpus",
        "mixture",
        "mixture_classes",
        "heldout",
        "cache_gb",
        "max_bad_share",
        "decode",
        "hw_decoder_load",
        "decode_threads",
    ):
        del values["data"][key]
    for key in ("micro_batch", "zero_stage", "precision", "compile", "recompute"):
        del values["training"][key]  # the layout, and the precision, which is compared as it was settled
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
    if "bad_samples" in values:
        parts.append(f"{values['bad_samples']:,.0f} bad samples replaced")
    if step < total:
        parts.append(f"{duration(seconds_left)} left")
    return ", ".join(parts)


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    """Dropout and stochastic depth start each step from a state that only seed, step and rank decide."""
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xC2B2AE3D27D4EB4F + rank * 0x165667B19E3779F9) % 2**63)


def _check_finite(what: str, step: int, value: torch.Tensor, ids: NDArray[np.int64], worker: workers.Worker) -> None:
    number = float(value.detach())
    if not math.isfinite(number):
        raise NonFiniteError(
            f"the {what} became {number} at step {step} on rank {worker.rank}, samples {ids.tolist()}: the last "
            "checkpoint is from before it. A lower optimizer.learning_rate, a longer optimizer.warmup or "
            "optimizer.gradient_clipping=1.0 would do; look at those samples too"
        )


def _check_skipped(engine: Any, step: int) -> None:
    """An update whose gradient is not finite is not applied, nor is any after it."""
    if float(nonfinite_flag(engine)):
        raise NonFiniteError(
            f"the gradient became infinite or not a number shortly before step {step}; it was not applied, and the "
            "last checkpoint is from before. A lower optimizer.learning_rate or a longer optimizer.warmup would do"
        )


def _mean_over_ranks(losses: list[torch.Tensor]) -> float:
    mean = torch.stack(losses).double().mean()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


def _check_shared_folder(folder: Path, worker: workers.Worker) -> None:
    """Every rank must see the run's folder: checkpoints are written there by all of them."""
    marker = folder / ".shared"
    token = workers.from_all(str(time.time_ns()))[0]
    if worker.leads:
        marker.write_text(token)
    if worker.world_size > 1:
        dist.barrier()
    seen = workers.from_all(marker.exists() and marker.read_text() == token)
    blind = [rank for rank, sees in enumerate(seen) if not sees]
    if blind:
        raise ValueError(
            f"the run's folder {folder} is not shared: rank(s) {', '.join(map(str, blind))} do not see what rank 0 "
            "wrote there. Set run.home (or VITFORGE_HOME) to a folder that every node mounts"
        )


def _show_batch(batch: Batch, corpus: Mixture, settings: StageSettings, folder: Path, run: tracking.Run) -> None:
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
