"""The training loop, from top to bottom. It knows nothing of Ray: whoever starts the ranks calls `train`.

One optimizer step: every rank takes its slice of the step's positions of the corpus order, micro-batch by
micro-batch; DALI decodes and augments; the loss goes backward; DeepSpeed reduces, clips and updates. Nothing
but the step decides what happens in it, so that a restart continues as if it had never stopped.

Between two steps the ranks hear what all of them have to say: that one was told to stop, that a loss is not finite.
"""

import itertools
import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from cluster.command import Progress, duration, log, set_up_logging
from cluster.folders import Folder, at_hand
from cluster.redact import cleaned
from data_prep.checked_rows import Checks
from data_prep.mixture import Mixture
from models.losses import dense_targets, sigmoid_cross_entropy, softmax_cross_entropy
from models.presets import train_flops
from models.vit import VisionTransformer, VitConfig
from models.weights import load_into, load_safetensors
from pipeline import (
    agreement,
    augment,
    checkpoints,
    decoder_choice,
    layout,
    pictures,
    pixels,
    saving,
    throughput,
    tracking,
    workers,
)
from pipeline.config import StageSettings, duration_in_steps
from pipeline.consensus import Consensus
from pipeline.corpora import describe_order, open_corpora
from pipeline.early_stopping import STATE, EarlyStopping
from pipeline.elastic import begin_with, swap_average
from pipeline.engine import (
    build_engine,
    destroy,
    free_memory,
    nonfinite_flag,
    prepare_deepspeed,
    reduce_and_update,
    set_learning_rate,
)
from pipeline.health import NAMES, Health, Trouble
from pipeline.identity import identity_of
from pipeline.loader import Batch, EvalLoader, TrainLoader, check_bad, window_of
from pipeline.optimizer import averaging_decay
from pipeline.oversight import Oversight
from pipeline.run_files import INITIAL_WEIGHTS, producing
from pipeline.sample_record import SampleRecord
from pipeline.schedules import Schedule
from pipeline.scoring import score
from pipeline.stopping import Control

_LONG_STEP_S = 15.0
"""Seconds between words about how far a single step is."""
_SLOW_STORAGE = 50e6
"""Bytes/s that a rank brings to the run's folder at least, as long as nothing was measured."""


@dataclass(frozen=True)
class Job:
    """What the ranks are told. It travels to other machines."""

    settings: StageSettings
    architecture: dict[str, Any]
    """The model, as `VitConfig.to_json` gives it."""
    folder: Folder
    """The run's folder, which every rank sees."""
    corpora: tuple[Folder, ...]
    """Where the images are. With a folder travels what opens an object store."""
    checks: Checks
    """Of the indices of the corpora as the driver saw them; ranks read no row that is another."""
    initial_weights: bool
    """Whether the run starts from the weights in its folder; False draws them from the seed."""
    lease: str | None
    """Token of the lease on the folder; None where this process holds it."""
    tracking_home: str
    tracking_uri: str
    mlflow_run: str


def train(job: Job, control: Control) -> bool:
    """Train one model to the end of its duration, from its newest checkpoint if it has one. Every rank calls it.

    Returns:
        False if it was told to stop before that; what it had done is saved.

    Raises:
        ValueError: what the user can put right, with what would do.
        NonFiniteError: the loss went wrong; naming step, rank and samples.
    """
    settings = job.settings
    set_up_logging()
    prepare_deepspeed()
    worker = workers.join(settings.run.collective_timeout_s, settings.run.interface)
    if not worker.leads:
        log.setLevel("ERROR")
    agreement.check_folder(job.folder, worker)
    with Oversight(worker, control, job.folder, settings.run.name, job.lease, settings.run.hang_timeout_s) as oversight:
        finished = _train(job, worker, oversight)
        oversight.update(state="finished" if finished else "stopped")
        return finished


def _train(job: Job, worker: workers.Worker, oversight: Oversight) -> bool:
    settings, folder = job.settings, job.folder
    training, data = settings.training, settings.data

    # ---- data ------------------------------------------------------------------------------------------------
    # The driver checked the content of the index; here the sizes do.
    corpus, heldout = agreement.on_all_ranks(lambda: open_corpora(data, check="sizes", checks=job.checks))
    hashes = {"the training data": corpus.corpus_hash} | ({"data.heldout": heldout.corpus_hash} if heldout else {})
    agreement.check_ranks(hashes, worker)
    verdict = decoder_choice.Verdict.for_all(workers.from_all(decoder_choice.choose_backend(data, worker.gpu)))
    backend = verdict.backend

    # ---- model and engine ------------------------------------------------------------------------------------
    def steps(text: str) -> int:
        return duration_in_steps(text, training.global_batch, corpus.num_samples)

    config = VitConfig.from_json(job.architecture)
    keep_every = steps(settings.checkpoint.keep_every) if settings.checkpoint.keep_every else None
    saved = saving.Checkpoints(folder.child("checkpoints"), settings.checkpoint, worker, keep_every)
    resume = saved.newest()
    # All ranks must come to the same decisions.
    machine = layout.Machine.poorest(workers.from_all(layout.Machine.here(worker)))
    plan = layout.settle(settings, config, worker.world_size, machine, resume.state if resume else None)
    identity = {**identity_of(settings, config, corpus), "precision": plan.precision}

    def check(checkpoint: checkpoints.Checkpoint) -> None:
        checkpoints.check_resumable(checkpoint, identity, type(settings), settings.run.allow_changes)

    def engine_at(checkpoint: checkpoints.Checkpoint | None) -> tuple[Any, checkpoints.Checkpoint | None]:
        """An engine as a checkpoint has it (or one before it that is whole), or as training begins."""
        torch.manual_seed(training.seed)
        model = VisionTransformer(config)
        if job.initial_weights:
            with at_hand(folder, INITIAL_WEIGHTS) as path:
                load_into(model, load_safetensors(path))
        drawn = {name: parameter.detach() for name, parameter in model.named_parameters()}
        engine = build_engine(model, settings.optimizer, plan, training.global_batch, worker, training.ema > 0)
        if checkpoint:
            return engine, saved.load(engine, checkpoint, check)
        if plan.precision != "fp32":
            begin_with(engine, drawn)
        return engine, None

    if resume:
        check(resume)
    needed = layout.saved_bytes(config, worker.world_size, training.ema > 0)
    agreement.check_room(needed, saved.scratch, worker)
    engine, resume = engine_at(resume)
    step = saved_step = resume.step if resume else 0
    saved.longest_s = resume.state.get("save_seconds") if resume else None

    # ---- durations -------------------------------------------------------------------------------------------
    total = steps(training.duration)
    rate_of = Schedule(settings.optimizer, total, training.global_batch, corpus.num_samples)
    checkpoint_every = steps(settings.checkpoint.every)
    evaluate_every = steps(settings.evaluation.every) if settings.evaluation.every else None
    keeps_best = settings.checkpoint.keep_best is not None  # what is scored is saved then

    # ---- what is written -------------------------------------------------------------------------------------
    run, metrics_file = None, None
    if worker.leads:
        tracking.connect(Path(job.tracking_home), job.tracking_uri)
        run = tracking.Run("", job.mlflow_run)
        metrics_file = tracking.MetricsFile(folder, step)
        run.catch_up(tracking.metrics_of(folder))
        run.tag("vitforge.decoder", f"{backend}: {verdict.why}")
        run.tag("vitforge.layout", str(plan))
    oversight.update(state="training", step=step, total=total, checkpoint_step=step or None)
    oversight.follow(lambda: saved.committed)
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

    # ---- what the ranks hear of each other -------------------------------------------------------------------
    consensus = Consensus(("stop", *NAMES), worker, settings.run.collective_timeout_s)
    health = Health(settings.health, worker, resume.state.get("usual_losses", []) if resume else [])
    stop = False

    def listen(everything: bool = False) -> Trouble | None:
        """Tell the others and hear them: one step late, or of everything that was done, which waits for them."""
        nonlocal stop
        trouble = None
        heard = [consensus.exchange(stop=oversight.wants_stop, **health.tell())]
        if everything:  # one step after the other: two that are told together are judged as one
            heard.append(consensus.exchange(stop=oversight.wants_stop, **health.tell(everything=True)))
            heard.append(consensus.settle())
        for sums in heard:
            if sums is not None and trouble is None:
                stop = stop or sums["stop"] > 0
                trouble = health.judge(sums)
        return trouble

    # ---- saving and scoring ----------------------------------------------------------------------------------
    skipped: list[int] = resume.state.get("skipped", []) if resume else []
    unscored = heldout is not None and resume is not None and (resume.state.get("unscored", False) or step >= total)
    """Whether scores are due that a wish to stop, or a crash, left no time for."""
    scored: dict[int, dict[str, float]] = {}
    early_stopping = EarlyStopping(settings.early_stopping, resume.state if resume else {})

    def save() -> None:
        nonlocal saved_step
        oversight.at("checkpoint", step)
        state = {
            **identity,
            "world_size": worker.world_size,
            "zero_stage": plan.zero_stage,
            "resolved_settings": cleaned(settings.model_dump(mode="json")),
            "decoder": backend,
            "micro_batch": plan.micro_batch,
            "samples_consumed": step * training.global_batch,
            "skipped": skipped,
            "unscored": unscored,
            "usual_losses": health.usual,
            "mlflow_run": job.mlflow_run,
            "memory": machine.memory,
            "versions": agreement.versions(),
            "scores": scored.get(step, {}),
            STATE: early_stopping.to_json(),
            "save_seconds": saved.longest_s,
            "throughput": meter.total(step - began, resume.state.get("throughput") if resume else None),
        }
        saved.save(engine, step, state)
        saved_step = step
        if run and metrics_file:
            metrics_file.publish()
            run.flush()

    def evaluate() -> None:
        nonlocal unscored
        assert heldout is not None
        batches = itertools.count(1)

        def goes_on() -> bool:
            oversight.at(f"evaluation, batch {next(batches)}", step)
            listen()
            return not stop

        loader = EvalLoader(heldout, data, worker, settings.evaluation.batch, backend)
        if training.ema:
            swap_average(engine)
        scores = score(engine.module, loader, settings.loss.kind, plan.dtype, goes_on)
        if training.ema:
            swap_average(engine)
        unscored = scores is None
        if scores is None:
            log.info("step %d: not scored, the run was told to stop; it will be when it goes on", step)
            return
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
        early_stopping.judge(step, named)
        if run and metrics_file:
            metrics_file.write(step, named)
            run.metrics(step, named)
            run.flush()

    # ---- the loop --------------------------------------------------------------------------------------------
    began = step
    peak = throughput.peak_flops(worker, plan.precision)

    def set_out() -> tuple[TrainLoader, Generator[Batch, None, None], throughput.Meter]:
        """The batches from `step` on, and a meter for them."""
        loader = TrainLoader(
            corpus, data, training.seed, worker, training.global_batch, plan.micro_batch, step, total, backend, skipped
        )
        meter = throughput.Meter(total - step, training.global_batch, train_flops(config), peak, worker.world_size)
        return loader, iter(loader), meter

    loader, batches, meter = set_out()
    if mixing_of_windows := describe_order(corpus, loader.order, loader.windows, training.global_batch):
        log.info("%s", mixing_of_windows)
    record = SampleRecord(folder, worker.rank) if settings.log.samples else None
    losses: list[torch.Tensor] = []
    logits: Any = None
    loss: Any = None

    def end_takes() -> float:
        """Seconds that saving and stopping may take: the checkpoint on its way, another one, the steps until then."""
        return 2 * (saved.longest_s or needed / _SLOW_STORAGE) + 3 * meter.longest_step_s

    oversight.needs_s = end_takes
    oversight.begin()
    listen(everything=True)
    if unscored and not stop:
        evaluate()
        if keeps_best and not unscored:
            save()  # in place of the one without scores
    trouble: Trouble | None = None
    while step < total and not stop and not early_stopping.ended:
        trouble = listen()
        if stop:
            break
        if trouble is None:
            meter.step_begins()
            # The first step after a start shows that it goes; the record has the same steps with and without restarts.
            recorded = (step + 1) % settings.log.every == 0 or step + 1 in (1, total)
            logged = recorded or step == began
            due = evaluate_every is not None and (step + 1) % evaluate_every == 0
            scores = heldout is not None and (due or step + 1 == total)
            saves = (step + 1) % checkpoint_every == 0 or step + 1 == total or (scores and keeps_best)
            step_ids: list[NDArray[np.int64]] = []
            _seed_dropout(training.seed, step, worker.rank)
            window = window_of(step, skipped)
            mixing = augment.draw_mixing(data.augment, training.seed, window, data.image_size, data.rules)
            set_learning_rate(engine, rate_of(step), averaging_decay(training.ema, step))
            long_step = Progress(training.global_batch, "images", f"step {step + 1}", every=_LONG_STEP_S)
            for _ in range(plan.accumulation):
                oversight.at("first step" if step == began else "waiting for data", step + 1)
                with meter.waiting():
                    batch = next(batches)
                oversight.at("first step" if step == began else "computing", step + 1)
                step_ids.append(batch.ids)
                images = batch.images
                targets = dense_targets(
                    batch.rows, batch.classes, batch.weights, len(images), config.num_classes, worker.device
                )
                if mixing is not None:
                    images, targets = pixels.mix(images, targets, mixing)
                if step == 0 and worker.leads and run and not losses:
                    _show_batch(images, targets, corpus, settings, folder, run)
                logits = engine(images.to(plan.dtype))
                if settings.loss.kind == "softmax":
                    loss = softmax_cross_entropy(logits, targets, settings.loss.label_smoothing)
                else:
                    loss = sigmoid_cross_entropy(logits, targets)
                engine.backward(loss)
                norm = reduce_and_update(engine, measure=logged or saves)
                losses.append(loss.detach())
                long_step.update(plan.micro_batch * worker.world_size)
            mean = torch.stack(losses[-plan.accumulation :]).mean()
            health.took(step + 1, window, np.concatenate(step_ids), mean, nonfinite_flag(engine))
            if record:
                record.write(step + 1, step_ids)
            step += 1
            # Before anything is recorded or saved, all that led to it is looked at.
            if logged or saves or scores:
                trouble = listen(everything=True)
            meter.step_ended()
        if trouble is not None:
            oversight.at("checkpoint", step)
            saved.wait()  # what is on its way is from before it
            skipped = health.handle(trouble, skipped, folder, corpus)
            batches.close()
            destroy(engine)
            engine = logits = loss = None
            free_memory()
            engine, resume = engine_at(saved.newest())
            began = step = saved_step = resume.step if resume else 0
            consensus.settle()
            health.begin_again(resume.state.get("usual_losses", []) if resume else [])
            early_stopping.begin_again(resume.state if resume else {})
            losses.clear()
            if metrics_file:
                metrics_file.go_back(step)
            loader, batches, meter = set_out()
            continue
        oversight.update(step=step)
        if logged:
            assert norm is not None
            values = {
                "loss": _mean_over_ranks(losses),
                "learning_rate": rate_of(step - 1),
                "gradient_norm": norm,
                **meter.measure(step - began),
            }
            if bad := check_bad(loader, (step - began) * training.global_batch, data.max_bad_share):
                values["bad_samples"] = bad
            oversight.update(loss=values["loss"], images_per_second=values["images_per_second"], bad_samples=bad)
            log.info("%s", throughput.log_line(step, total, values, meter.seconds_left(step - began)))
            if recorded:
                losses.clear()
            if run and metrics_file and recorded:
                metrics_file.write(step, values)
                run.metrics(step, {tracking.metric_name(key): value for key, value in values.items()})
        if scores:
            # Before the checkpoint: a restart from it must not find the scores missing.
            with meter.paused():
                evaluate()
        if saves or early_stopping.ended:
            with meter.stalled():
                save()
            losses.clear()  # so that a restart from here averages over the same steps

    # ---- the end ---------------------------------------------------------------------------------------------
    if step > saved_step:
        rest = listen(everything=True)
        trouble = trouble or rest  # it may have come with the wish to stop
        if trouble is None:
            save()
        else:
            oversight.at("checkpoint", step)
            saved.wait()
            health.handle(trouble, skipped, folder, corpus)
            step = saved_step  # what came after is not worth keeping
    oversight.at("checkpoint", step)
    saved.wait()
    saved.close()
    if run and metrics_file:
        run.flush()
        metrics_file.publish(must=True)
        metrics_file.close()
    batches.close()
    destroy(engine)
    dist.barrier()
    finished = (step >= total or early_stopping.ended) and not unscored
    if not finished:
        log.info("stopped at step %d of %d, which is saved; the same command goes on from there", step, total)
    elif step > began:
        log.info("trained %d steps in %s", step - began, duration(meter.elapsed()))
    return finished


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    """Dropout and stochastic depth start each step from a state that only seed, step and rank decide.

    They are the same after a restart; another number of ranks or another micro-batch draws other masks.
    """
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xC2B2AE3D27D4EB4F + rank * 0x165667B19E3779F9) % 2**63)


def _mean_over_ranks(losses: list[torch.Tensor]) -> float:
    mean = torch.stack(losses).double().mean()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


def _show_batch(
    images: torch.Tensor,
    targets: torch.Tensor,
    corpus: Mixture,
    settings: StageSettings,
    folder: Folder,
    run: tracking.Run,
) -> None:
    """A picture of what the model gets: images [B, 3, S, S] and targets [B, C], after mixing."""
    names = pictures.label_lines(targets, corpus.classes)
    assert settings.data.mean is not None
    assert settings.data.std is not None
    with producing(folder, "first_batch.png") as path:
        pictures.draw_batch(images, settings.data.mean, settings.data.std, names, path)
        run.artifact(path)


if __name__ == "__main__":
    sys.exit("this module is started by pipeline/pretrain.py and pipeline/finetune.py")
