"""The end of a stage: which checkpoint is handed over, to the registry, and how the run went, RUN/result.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.command import log
from cluster.folders import Folder, at_hand
from cluster.waiting import Waiting
from data_prep.mixture import Mixture
from models.vit import VitConfig
from pipeline import checkpoints, mlflow_pages, packages, pictures, tracking
from pipeline.checkpoints import Checkpoint
from pipeline.config import StageSettings, duration_in_steps
from pipeline.decoding import preprocessing_of
from pipeline.early_stopping import EarlyStopping
from pipeline.run_files import producing


def hand_over(
    settings: StageSettings,
    architecture: VitConfig,
    corpus: Mixture,
    heldout: Mixture | None,
    folder: Folder,
    run: tracking.Run,
    lineage: Mapping[str, str],
) -> dict[str, Any]:
    """Send MLflow what it lacks, publish the weights of a checkpoint, write down how the run went.

    Args:
        folder: the run's.
        lineage: tags of the version.

    Returns:
        The content of RUN/result.json.

    Raises:
        TrackingError: MLflow does not answer; the run's folder has its result then, without the model.
    """
    newest = checkpoints.newest(folder.child("checkpoints"))
    assert newest is not None
    rows = tracking.metrics_of(folder)
    handed = _chosen(settings, newest, folder, rows)
    with producing(folder, "curves.png") as path:
        marked = handed.step if settings.registry.checkpoint == "best" else None
        pictures.draw_curves(rows, path, corpus.num_samples / settings.training.global_batch, marked)
    result = _result(settings, folder, newest, handed, rows)
    try:
        run.complete(rows)
    except tracking.TrackingError as error:
        folder.write_json("result.json", result)
        also = f", and {settings.registry.name!r} has no version of this model yet" if settings.registry.name else ""
        raise tracking.TrackingError(
            f"the model is trained, and saved in {folder}, but {error}{also}. Run the same command again once it "
            "answers: that sends what is missing"
        ) from error
    run.missing_artifacts(folder, ("settings.json", "first_batch.png"))
    with at_hand(folder, "curves.png") as path:
        run.artifact(path)
    if settings.registry.name:
        with Waiting(f"the registry to take {settings.registry.name}"):
            published = packages.publish(
                settings.registry.name,
                checkpoints.full_weights(handed),
                architecture,
                preprocessing_of(settings.data),
                corpus.names,
                settings.loss.kind,
                tags={
                    **lineage,
                    "vitforge.mlflow_run": run.run_id,
                    "vitforge.run": settings.run.name,
                    "vitforge.steps": str(handed.step),
                    "vitforge.checkpoint": settings.registry.checkpoint,
                },
                run_id=run.run_id,
                alias=settings.registry.alias,
            )
        result["model"] = published.uri
        total = duration_in_steps(settings.training.duration, settings.training.global_batch, corpus.num_samples)
        facts = mlflow_pages.Facts(
            architecture, corpus, heldout, _scores_at(rows, handed.step), handed.step, newest.step, total,
            settings.training.ema > 0, lineage.get("vitforge.parent"),
        )  # fmt: skip
        mlflow_pages.describe_version(published.name, published.version, run.run_id, facts, packages.DESCRIPTION)
    folder.write_json("result.json", result)
    return result


def _chosen(
    settings: StageSettings, newest: Checkpoint, folder: Folder, rows: Sequence[Mapping[str, Any]]
) -> Checkpoint:
    """The checkpoint that is handed over: the newest, or the best that is there."""
    score = settings.checkpoint.keep_best
    if score is None or settings.registry.name is None:
        return newest
    if settings.registry.checkpoint != "best":
        last = newest.state.get("scores", {}).get(score)
        if last is not None and (row := _better(rows, score, last)):
            log.info(
                "handing over the last checkpoint (%s %.4f), though step %d had %.4f: registry.checkpoint=best hands "
                "that one over",
                score, last, row["step"], row[score],
            )  # fmt: skip
        return newest
    best = checkpoints.best(folder.child("checkpoints"), score)
    if best is None:
        log.warning("no checkpoint in %s has a %s: handing over the last one, of step %d", folder, score, newest.step)
        return newest
    kept = best.state["scores"][score]
    if row := _better(rows, score, kept):
        log.warning(
            "step %d scored better (%s %.4f), but its checkpoint is not there any more, or damaged",
            row["step"],
            score,
            row[score],
        )
    log.info("handing over the checkpoint of step %d, the best by %s: %.4f", best.step, score, kept)
    return best


def _better(rows: Sequence[Mapping[str, Any]], score: str, than: float) -> Mapping[str, Any] | None:
    """The step that scored best, if it did better than that."""
    best = None
    for row in rows:
        if score in row and checkpoints.is_better(score, row[score], than if best is None else best[score]):
            best = row
    return best


def _scores_at(rows: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """The held-out scores of a step, if it has any."""
    found = [row for row in rows if row["step"] == step and "heldout/top1" in row]
    return {key: value for key, value in found[-1].items() if key.startswith("heldout/")} if found else {}


def _result(
    settings: StageSettings, folder: Folder, newest: Checkpoint, handed: Checkpoint, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """How a run went, but for the model that it registers."""
    rates = [row["images_per_second"] for row in rows if "images_per_second" in row]
    waits = [row["data_wait"] for row in rows if "data_wait" in row]
    # The first line of a run holds the warm-up of everything.
    rates, waits = rates[1:] or rates, waits[1:] or waits
    rate = sorted(rates)[len(rates) // 2] if rates else None
    spent = newest.state.get("throughput", {"images": 0})
    scores = _scores_at(rows, handed.step)
    return {
        "run": settings.run.name,
        "folder": str(folder),
        "steps": newest.step,
        "images_per_second": rate,  # as it was called before there were two
        # The median of the windows between log lines, without evaluations and checkpoints.
        "images_per_second_training": rate,
        # All images by all of the time in the loop, with evaluations and with every checkpoint before this one.
        "images_per_second_overall": spent["images"] / spent["seconds"] if spent["images"] else None,
        "data_wait": sorted(waits)[len(waits) // 2] if waits else None,
        # Of what is handed over.
        "heldout_top1": scores.get("heldout/top1"),
        "checkpoint": {"kind": settings.registry.checkpoint, "step": handed.step, "scores": scores},
        "early_stopping": _early_stopping(settings, newest),
        "model": None,
    }


def _early_stopping(settings: StageSettings, newest: Checkpoint) -> dict[str, Any] | None:
    """How early stopping went; None where it is off."""
    if settings.early_stopping.patience is None:
        return None
    counted = EarlyStopping(settings.early_stopping, newest.state)
    best, best_step = counted.best or (None, None)
    return {
        "ended_the_run": counted.ended,
        "monitor": settings.early_stopping.monitor,
        "best": best,
        "best_step": best_step,
        "evaluations_without_improvement": counted.waited,
    }
