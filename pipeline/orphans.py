"""Weights in MLflow's store that belong to no version of a model: what publishing left that was killed."""

import json
import re
from collections.abc import Mapping
from typing import Any

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from cluster.command import log
from cluster.ownership import is_dead, is_here, this_process

_OWNER = "vitforge.owner"
"""Tag of a logged model: the process that publishes it, for as long as it does."""
_REGISTERED = "mlflow.modelVersions"
"""Tag that MLflow gives a logged model that a version is made of."""
_MODEL = re.compile(r"m-[0-9a-f]{32}")
_PLACE = re.compile(r".*/models/(m-[0-9a-f]{32})/artifacts/?")
"""Where MLflow keeps the files of a logged model."""


def mark() -> dict[str, str]:
    """Tags of a logged model that this process publishes."""
    return {_OWNER: json.dumps(this_process())}


def remove(run_id: str, experiment_id: str) -> None:
    """Remove the logged models of an experiment, with their files, that became no version of a registered model.

    Only those that carry our mark, which what is published has lost. Of `run_id` that is what this process left, and
    what any other did that is not seen to live: one process at a time publishes models of a run, the one that holds the
    run's lease. Of other runs it is what processes left that are seen to be dead. What MLflow does not remove costs a
    warning.
    """
    client = mlflow.MlflowClient()
    try:
        marked = mlflow.search_logged_models([experiment_id], f"tags.`{_OWNER}` LIKE '%'", output_format="list")
        for model in marked:
            if not _is_left(model.tags, held=model.source_run_id == run_id) or _REGISTERED in model.tags:
                continue
            versions = client.search_model_versions(f"run_id = '{model.source_run_id}'")
            place = _PLACE.fullmatch(model.artifact_location)
            if model.model_id in set().union(*map(models_of, versions)):
                continue
            if place is None or place[1] != model.model_id:  # what a server says decides no path
                continue
            log.info("removing %s, which was never published", model.artifact_location)
            get_artifact_repository(model.artifact_location).delete_artifacts()
            client.delete_logged_model(model.model_id)
    except Exception as error:  # MLflow lets those of its stores through
        log.warning("what publishing left that was killed could not be removed (%s)", str(error).partition("\n")[0])


def keep(version: ModelVersion) -> None:
    """Take the mark from what was published: it stays, whatever becomes of its version."""
    client = mlflow.MlflowClient()
    for model_id in models_of(version):
        try:
            if _OWNER in client.get_logged_model(model_id).tags:
                client.delete_logged_model_tag(model_id, _OWNER)
        except MlflowException as error:
            log.warning("MLflow did not take a tag from %s (%s)", model_id, error.message)


def models_of(version: ModelVersion) -> set[str]:
    """The logged model that a version is made of. (MLflow 3.17's own stores say it in its source alone.)"""
    return {*_MODEL.findall(version.source or ""), *filter(None, [version.model_id])}


def _is_left(tags: Mapping[str, str], held: bool) -> bool:
    """Whether the owner that a mark names does not need its model any more.

    Args:
        held: nobody else may publish models of the run.
    """
    try:
        owner: Any = json.loads(tags.get(_OWNER, ""))
    except ValueError:
        return False
    if not isinstance(owner, dict):
        return False
    return is_dead(owner) or (held and (owner == this_process() or not is_here(owner)))
