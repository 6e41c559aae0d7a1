"""What pre-training and fine-tuning share around the loop: checks, the run's folder, tracking, the hand-over."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cluster import storage
from cluster.command import absolute_path, check_folder, home_path, log
from cluster.folders import Folder, folder_at
from cluster.launch_environment import leads, under_torchrun
from cluster.lease import Lease
from cluster.ray_runtime import REPOSITORY
from cluster.redact import cleaned, without_credentials
from cluster.settings import SettingsError
from data_prep.checked_rows import Checks
from data_prep.mixture import Mixture
from models.vit import VitConfig
from models.weights import save_safetensors
from pipeline import checkpoints, layout, mlflow_pages, tracking
from pipeline.agreement import SHARED, code_hash
from pipeline.config import RunSettings, StageSettings, duration_in_steps, seconds_of
from pipeline.corpora import some
from pipeline.crew import Terms
from pipeline.early_stopping import ended
from pipeline.hand_over import hand_over
from pipeline.identity import Stage, as_begun, identity_of
from pipeline.launch import run_ranks
from pipeline.proportions import check_proportions
from pipeline.run_description import tell
from pipeline.run_files import INITIAL_WEIGHTS, METRICS, producing, read_run_record
from pipeline.run_settings import EARLIER, SETTINGS, changes_since, decides, keep_settings, tell_changes
from pipeline.schedules import Schedule
from pipeline.scratch import check_package_room, room_for_hand_over, temporary_files
from pipeline.train_loop import Job, train

_BEGUN = re.compile(
    r"(run|settings|heartbeat)\.json|initial\.safetensors|first_batch\.png|"
    rf"checkpoints/step-[0-9a-f-]+/({checkpoints.FILES.pattern})"
)
"""The files of a run's folder before the first step, without its lease."""
_WITHOUT_RECORD = {
    "lease.json", "heartbeat.json", METRICS, INITIAL_WEIGHTS, "first_batch.png", "curves.png",
    "result.json", "reports", "samples", "checkpoints", SHARED, EARLIER,
}  # fmt: skip
"""What may be in a run's folder that has lost its run.json, or never had one: that is the first to be written."""


_MOST_EPOCHS_A_STEP = 10
"""A step of more images than the corpus has learns nothing from the others; so many times as many are a mistake."""

Colors = tuple[float, float, float]


@dataclass(frozen=True)
class Start:
    """What a stage begins with."""

    architecture: VitConfig
    weights: dict[str, torch.Tensor] | None
    """Initial weights; None draws them from the seed."""
    parent: str | None = None
    """The resolved parent, models:/NAME/VERSION."""
    parent_run: str | None = None
    """The MLflow run that made the parent."""
    colors: tuple[Colors, Colors] | None = None
    """Mean and deviation of the parent's preprocessing."""
    checks: Checks = field(default_factory=dict)
    """Of the indices of the corpora, as they were when they were looked at (data_prep/checked_rows.py)."""


def home_folder(home: str, key: str = "run.home") -> Path:
    """The folder of the tracking database and artifacts: on this machine, also where the runs are on an object store.

    Args:
        home: as it was set; empty takes VITFORGE_HOME.
        key: the setting, for messages.

    Raises:
        ValueError: a relative path inside a submitted job, a URL in VITFORGE_HOME, a place where no folder can be, or
            where MLflow can keep no database.
    """
    if home and "://" not in home:
        folder = Path(absolute_path(home, key))
        check_folder(folder, key)
    else:
        path = home_path()
        if "://" in path:
            advice = f"give run.home={path} for the runs alone"
            raise SettingsError(f"VITFORGE_HOME = {path!r}: MLflow needs a folder; {advice}")
        folder = Path(path)
        check_folder(folder, "VITFORGE_HOME")
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        tracking.database_uri(folder)  # refused now if MLflow cannot keep one there
    return folder


def run_folder(settings: RunSettings) -> Folder:
    """The folder of a run, on a mounted file system or an object store.

    Raises:
        ValueError: a relative path inside a submitted job, or a URL of a kind that is not supported.
    """
    home = absolute_path(settings.home, "run.home") if "://" in settings.home else str(home_folder(settings.home))
    return folder_at(home, "run.home").child("runs").child(settings.name)


def check_stage(settings: StageSettings, corpus: Mixture) -> None:
    """Everything about a stage that can be refused before anything expensive starts.

    Raises:
        SettingsError: naming the key, the value and what would do.
    """
    if settings.loss.kind == "softmax" and corpus.label_kind == "multi":
        raise SettingsError(f"loss.kind = 'softmax', but {corpus} has many labels an image: use loss.kind=sigmoid")
    if len(corpus.classes) == 1 and (settings.loss.kind == "softmax" or corpus.label_kind == "single"):
        raise SettingsError(
            f"{corpus} has one class, {corpus.names[0]!r}: every image is of it, and there is nothing to learn. Shard "
            "images of several classes: a folder for each with their parent as the source, or a table of labels"
        )
    total = duration_in_steps(settings.training.duration, settings.training.global_batch, corpus.num_samples)
    Schedule(settings.optimizer, total, settings.training.global_batch, corpus.num_samples)
    if settings.run.worker_bounds is not None:
        fewest, most = settings.run.worker_bounds
        if not any(_splits(settings, ranks) for ranks in range(fewest, most + 1)):
            _check_batch(settings, most)
    empty = [name for name, count in zip(corpus.classes, corpus.class_counts, strict=True) if count == 0]
    if empty:
        log.warning(
            "%d of the %d classes of %s have no images and cannot be learned: %s",
            len(empty),
            len(corpus.classes),
            corpus,
            some(empty),
        )
    if settings.training.global_batch > _MOST_EPOCHS_A_STEP * corpus.num_samples:
        raise SettingsError(
            f"training.global_batch = {settings.training.global_batch:,} is "
            f"{settings.training.global_batch / corpus.num_samples:,.0f} times the {corpus.num_samples:,} images of "
            f"{corpus}: every step would go through all of them so often. Set it to at most {corpus.num_samples:,}"
        )
    if settings.training.global_batch > corpus.num_samples:
        log.warning(
            "training.global_batch = %d is more than the %d images of the corpus: some come twice in a step",
            settings.training.global_batch,
            corpus.num_samples,
        )


def resumed_settings(settings: Stage) -> Stage:
    """The settings as a run goes on with them, where it has a checkpoint: what nobody gave is as it was then.

    Raises:
        ValueError: checkpoint.scratch can be no folder of this machine.
        SettingsError: the run has not begun, and they make no sense together; or none of its checkpoints is whole.
    """
    if scratch := settings.checkpoint.scratch:
        scratch = str(storage.local_path(absolute_path(scratch, "checkpoint.scratch"), "checkpoint.scratch"))
        check_folder(Path(scratch), "checkpoint.scratch")
        settings = settings.model_copy(
            update={"checkpoint": settings.checkpoint.model_copy(update={"scratch": scratch})}
        )
    newest = checkpoints.newest(run_folder(settings.run).child("checkpoints"))
    if newest is None:
        check_proportions(settings)
        return settings
    return as_begun(settings, newest.state)


def run_stage(
    stage: str, settings: StageSettings, start: "Start", corpus: Mixture, heldout: Mixture | None
) -> dict[str, Any]:
    """Train on all ranks and hand the model over. A rerun resumes, and repeats nothing that was finished.

    Args:
        stage: pretrain or finetune.
        settings: with absolute paths, mean and std filled in.
        corpus, heldout: what it trains on, and what it is scored on.

    Returns:
        The content of RUN/result.json: the model's URI, held-out scores, images/s.
    """
    home, folder = home_folder(settings.run.home), run_folder(settings.run)
    if not leads():
        # Under torchrun every rank comes through here; rank 0 alone keeps the folder, the tracking and the registry.
        settings, newest = _resumed(settings, start, corpus, folder)
        _train(settings, start, corpus, newest, folder, home, None, "", "")
        return {}
    tell(stage, settings, start.architecture, corpus)
    weights = layout.package_bytes(start.architecture)
    if settings.registry.name:
        check_package_room(
            settings.checkpoint.scratch, weights, None if os.environ.get("MLFLOW_TRACKING_URI") else home
        )
    with _held(folder) as lease:
        record = _open_record(folder, stage, start)
        settings, newest = _resumed(settings, start, corpus, folder)
        uri = tracking.connect(home)
        values = cleaned(settings.model_dump(mode="json"))
        step = newest.step if newest is not None else 0
        changes = changes_since(folder, type(settings), values)
        lineage = _lineage(stage, corpus, start)
        run = _tracked(settings, record, folder, values, lineage, start.parent_run, step == 0 and decides(changes))
        written = keep_settings(folder, values, changes, step)
        if run.run_id != record.get("mlflow_run"):  # which has the parameters that hold
            changes, written = {}, [*dict.fromkeys([SETTINGS, *written])]
        tell_changes(run, folder, changes, written, step)
        mlflow_pages.name_inputs(run.run_id, corpus, heldout, start.parent)
        log.info("run %s in %s, tracked at %s", settings.run.name, folder, uri)
        if start.weights is not None and folder.size(INITIAL_WEIGHTS) is None:
            with temporary_files(settings.checkpoint.scratch, "weights"), producing(folder, INITIAL_WEIGHTS) as path:
                save_safetensors(start.weights, path)
        with tracking.closing(run, drop=lambda: folder.size(METRICS) is None):
            _train(settings, start, corpus, newest, folder, home, lease, uri, run.run_id)
            scratch = settings.checkpoint.scratch
            with room_for_hand_over(scratch, weights, home), temporary_files(scratch, "hand-over"):
                return hand_over(settings, start.architecture, corpus, heldout, folder, run, lineage)


def _tracked(
    settings: StageSettings,
    record: dict[str, Any],
    folder: Folder,
    values: dict[str, Any],
    tags: dict[str, str],
    parent_run: str | None,
    anew: bool,
) -> tracking.Run:
    """The tracking run of the run's folder: the one that it was begun with, or a new one.

    Args:
        values: the settings as they are recorded.
        anew: the run begins again from its first step, with other settings: its tracking run has those of before, and
            perhaps points of their steps.

    Raises:
        LostRunError: MLflow has lost it, and run.new_tracking does not allow another one.
    """
    begun = record.get("mlflow_run")
    try:
        run = tracking.Run(settings.run.name, begun, values, tags, parent_run)
        if begun is not None and anew and not os.environ.get("MLFLOW_RUN_ID"):
            before, run = (
                run,
                tracking.Run(settings.run.name, None, values, {**tags, "vitforge.instead_of": str(begun)}, parent_run),
            )
            before.tag("vitforge.begun_again_as", run.run_id)
            before.finish("KILLED")
            log.info(
                "other settings before the first checkpoint: tracked as a new run %s instead of %s", run.run_id, begun
            )
        elif begun is not None:
            there = run.tags()
            for key, value in tags.items():
                if there.get(key, value) != value:
                    run.tag(key, value)  # of the command that the run goes on by
    except tracking.LostRunError:
        if not settings.run.new_tracking:
            raise
        run = tracking.Run(settings.run.name, None, values, {**tags, "vitforge.instead_of": str(begun)}, parent_run)
        log.warning("MLflow has lost run %s: going on with run %s, which gets all of its metrics", begun, run.run_id)
    tracked = {**record, "mlflow_run": run.run_id}
    if read_run_record(folder) != tracked:
        folder.write_json("run.json", tracked)
    return run


def _resumed(
    settings: StageSettings, start: Start, corpus: Mixture, folder: Folder
) -> tuple[StageSettings, checkpoints.Checkpoint | None]:
    """The checkpoint that the run goes on from, refused if it is of another run, and the settings it goes on with."""
    total = duration_in_steps(settings.training.duration, settings.training.global_batch, corpus.num_samples)
    # One that is handed over without a rank that would load it and fall back is verified here.
    newest = checkpoints.newest(folder.child("checkpoints"), verify_from=total)
    if newest is not None and newest.step < total and ended(settings.early_stopping, newest.state):
        newest = checkpoints.newest(folder.child("checkpoints"), verify_from=newest.step)
    if newest is not None:
        settings = as_begun(settings, newest.state)
        identity = identity_of(settings, start.architecture, corpus)
        checkpoints.check_resumable(newest, identity, type(settings), settings.run.allow_changes)
    return settings, newest


def _train(
    settings: StageSettings,
    start: Start,
    corpus: Mixture,
    newest: checkpoints.Checkpoint | None,
    folder: Folder,
    home: Path,
    lease: str | None,
    uri: str,
    run_id: str,
) -> None:
    total = duration_in_steps(settings.training.duration, settings.training.global_batch, corpus.num_samples)
    if newest is not None and (newest.step >= total or ended(settings.early_stopping, newest.state)):
        rows = tracking.metrics_of(folder)
        scores = [row for row in rows if row["step"] == newest.step and "heldout/top1" in row]
        if settings.data.heldout is None or scores:
            log.info("training is finished already (%s)", newest.folder)
            return
    job = Job(
        settings,
        start.architecture.to_json(),
        folder,
        tuple(part.folder for part in corpus.parts),
        start.checks,
        start.weights is not None,
        None if under_torchrun() else lease,
        str(home),
        uri,
        run_id,
    )
    run_ranks(
        train,
        job,
        name=settings.run.name,
        terms=Terms(
            settings.run.worker_bounds,
            settings.run.cpus_per_worker,
            settings.run.max_failures,
            settings.run.collective_timeout_s,
            settings.run.resize_check_s,
            settings.run.wait_s,
            settings.run.interface,
        ),
        check=lambda ranks: _check_batch(settings, ranks),
        progress=lambda: checkpoints.newest_name(folder.child("checkpoints")),
        limit_s=None if settings.run.stop_after is None else seconds_of(settings.run.stop_after),
    )


def _splits(settings: StageSettings, ranks: int) -> bool:
    try:
        _check_batch(settings, ranks)
    except SettingsError:
        return False
    return True


def _check_batch(settings: StageSettings, ranks: int) -> None:
    training = settings.training
    layout.check_batch(training.global_batch, training.micro_batch, ranks, settings.data.augment.mixes)


@contextmanager
def _held(folder: Folder) -> Iterator[str]:
    """The run's folder, held against a second job, removed again if no step was taken in it; gives the lease's token.

    Raises:
        SettingsError: it cannot be made, or is no run's.
        LeaseError: another job works in it.
    """
    there = [*folder.names(), *folder.folders()]
    fresh = not there
    known = _WITHOUT_RECORD | ({"settings.json"} if METRICS in there else set())  # alone it may be anybody's
    if "run.json" not in there and (others := sorted({*there} - known)):
        raise SettingsError(f"{folder} holds {others[0]!r} and is no run's folder: use another run.name")
    with ExitStack() as stack:
        try:
            lease = stack.enter_context(Lease(folder))
        except OSError as error:
            raise SettingsError(
                f"{folder} cannot be made ({error.strerror or error}): set run.home or VITFORGE_HOME to a folder that "
                "can"
            ) from error
        folder.remove_unfinished()
        try:
            yield lease.token
        except ValueError:
            if fresh and folder.size(METRICS) is None:
                for name in filter(_BEGUN.fullmatch, folder.tree()):
                    folder.remove(name)
                lease.leaves_file = False
                stack.close()  # gives the lease back: from here on another job may work there
                folder.remove_empty()
            raise


def _open_record(folder: Folder, stage: str, start: Start) -> dict[str, Any]:
    """RUN/run.json: which stage and parent the folder belongs to, its MLflow run.

    Where initial weights come with the start, and no checkpoint is there, those of before are of other settings.
    """
    own: dict[str, Any] = {"stage": stage, "parent": start.parent}
    if start.parent is not None:  # so that the run goes on without it
        architecture = start.architecture.to_json()
        own |= {"parent_run": start.parent_run, "architecture": architecture, "colors": start.colors}
    record = read_run_record(folder)
    if record is None:
        return own
    anew = bool(start.weights) and not checkpoints.newest_name(folder.child("checkpoints"))
    if record["stage"] != stage or (record["parent"] != start.parent and not anew):
        raise SettingsError(
            f"{folder} holds a {record['stage']} run from {record['parent'] or 'scratch'}, this is a {stage} run from "
            f"{start.parent or 'scratch'}: use another run.name"
        )
    if anew and folder.size(INITIAL_WEIGHTS) is not None:
        folder.remove(INITIAL_WEIGHTS)
    return {**record, **own} if anew else record


def _lineage(stage: str, corpus: Mixture, start: Start) -> dict[str, str]:
    tags = {
        "vitforge.stage": stage,
        "vitforge.corpus": corpus.corpus_hash,
        "vitforge.recipe": Path(sys.argv[1]).stem if len(sys.argv) > 1 else "",
        "vitforge.command": shlex.join(sys.argv),
        "vitforge.parent": start.parent or "",
        "vitforge.git_revision": git_revision(),
        "vitforge.code": code_hash(),
    }
    return {key: without_credentials(value) for key, value in tags.items() if value}


def git_revision() -> str:
    """The revision of the code, with -dirty where files were changed; unknown outside a git checkout."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def print_result(result: dict[str, Any]) -> None:
    """The last lines of a stage, for people and for programs that read its standard output."""
    if result:
        print(json.dumps(result, indent=1), flush=True)
