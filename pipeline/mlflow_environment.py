"""What the environment says of MLflow: the store, the experiment and the run that somebody else has chosen."""

import os
import re
from typing import TYPE_CHECKING, Any

from cluster.command import absolute_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

EXPERIMENT = "vitforge"
"""Where MLFLOW_EXPERIMENT_NAME and MLFLOW_EXPERIMENT_ID name no other."""
_TRACKING, _REGISTRY = "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"
_NAME, _ID, _RUN = "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"
_FILE = re.compile(r"(?P<scheme>sqlite(\+\w+)?:///|file:(//)?|)(?P<path>[^?#]*)(?P<rest>.*)", re.DOTALL)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:|databricks")


class MlflowEnvironmentError(ValueError):
    """The environment names what MLflow does not have, or two things at once; the message says which."""


def tracking_uri() -> str | None:
    """The store that MLFLOW_TRACKING_URI names; None where it names none.

    Paths in it and in MLFLOW_REGISTRY_URI are made absolute, there too: the workers that get the variables have
    another working folder.

    Raises:
        ValueError: such a path is relative in a submitted job, whose folder is deleted with it, or there is none.
    """
    for variable in (_TRACKING, _REGISTRY):
        if named := os.environ.get(variable):
            os.environ[variable] = _absolute(named, variable)
    return os.environ.get(_TRACKING) or None


def _absolute(uri: str, variable: str) -> str:
    parts = _FILE.fullmatch(uri)
    if uri in ("sqlite://", "sqlite:///") or (parts and parts["path"] == ":memory:"):
        raise MlflowEnvironmentError(
            f"{variable}={uri} is a database in the memory of one process, which the others cannot see: name a file "
            "(sqlite:////ABSOLUTE/PATH/mlflow.db) or a server"
        )
    # (After file:// comes the name of a host.)
    if parts is None or parts["scheme"] == "file://" or parts["path"].startswith(("/", "file:")):
        return uri
    if _SCHEME.match(parts["path"]):
        return uri
    return f"{parts['scheme']}{absolute_path(parts['path'], variable)}{parts['rest']}"


def experiment(client: "MlflowClient", place: str | None) -> "Experiment":
    """The experiment of new runs: the environment's, or ours; made if there is none of that name.

    Args:
        place: URI of the artifacts of one that is made; None leaves it to the server.

    Raises:
        MlflowEnvironmentError: there is none of that number, the name and the number are of two, or it was deleted.
    """
    name, number = os.environ.get(_NAME) or None, os.environ.get(_ID) or None
    if number is not None:
        found = _existing(client.get_experiment, number, f"{_ID}={number}: MLflow has no experiment of that number")
        if name not in (None, found.name):
            raise MlflowEnvironmentError(
                f"{_NAME}={name} and {_ID}={number} ({found.name}) name two experiments: unset one of them"
            )
    else:
        name = name or EXPERIMENT
        found = client.get_experiment_by_name(name)
        if found is None:
            found = client.get_experiment(client.create_experiment(name, artifact_location=place))
    if found.lifecycle_stage != "active":
        raise MlflowEnvironmentError(
            f"MLflow's experiment {found.name} (number {found.experiment_id}) was deleted: restore it (`mlflow "
            f"experiments restore -x {found.experiment_id}`), or name another by {_NAME}"
        )
    return found


def use_experiment(chosen: "Experiment") -> None:
    """Make an experiment MLflow's active one. It writes that into the environment: what the user said stays apart."""
    import mlflow

    before = os.environ.get(_ID)
    mlflow.set_experiment(experiment_id=chosen.experiment_id)
    if before is None:
        os.environ.pop(_ID, None)


def run_id(client: "MlflowClient") -> str | None:
    """The run that somebody else has made for a new run of ours (`mlflow run` does); None makes one.

    Raises:
        MlflowEnvironmentError: there is no such run.
    """
    named = os.environ.get(_RUN) or None
    if named is not None:
        found = _existing(client.get_run, named, f"{_RUN}={named}: MLflow has no run of that number")
        if found.info.lifecycle_stage != "active":
            raise MlflowEnvironmentError(f"{_RUN}={named}: that run was deleted. Restore it, or unset {_RUN}")
    return named


def _existing(get: Any, number: str, otherwise: str) -> Any:
    """What has a number in MLflow."""
    from mlflow.exceptions import MlflowException

    try:
        return get(number)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise MlflowEnvironmentError(f"{otherwise}: unset it, or name one that is there") from error
