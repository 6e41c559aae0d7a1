"""Names that MLflow is given, refused before anything starts where it would refuse them at the end."""

import os
import re
import unicodedata
from collections.abc import Callable
from typing import Any

from cluster.settings import SettingsError

_LONGEST_MODEL = 256
"""Characters of a registered model's name: the column of MLflow's database (SQLite alone does not mind)."""
_LONGEST_RUN = 250
"""As much, of a run's."""
_ALIAS = "a word such as champion would do"


def check_names(run: str, model: str | None, alias: str | None) -> None:
    """Refuse what MLflow would refuse, or could not be asked for, by MLflow's own rules.

    Args:
        run: name of the run.
        model: the registered model; None registers none.
        alias: of the version; None sets none.

    Raises:
        SettingsError: naming the setting and what would do.
    """
    if len(run) > _LONGEST_RUN:
        raise SettingsError(f"run.name has {len(run)} characters, MLflow takes {_LONGEST_RUN}")
    if alias is not None:
        _check_alias_here(alias)  # before MLflow is imported for the model's name
    if model is not None:
        check_model_name(model)
    if alias is not None:
        check_alias(alias)
    if experiment := os.environ.get("MLFLOW_EXPERIMENT_NAME"):
        check_experiment_name(experiment)


def check_model_name(name: str) -> None:
    """Refuse a name that no registered model can have, or that none could be found by.

    Raises:
        SettingsError: it is one.
    """
    what = f"registry.name = {name!r} cannot be a model's name"
    would_do = "letters, digits, spaces, '-', '_' and '.' would do"
    # First what needs no import of MLflow, which takes seconds.
    if reason := _trouble_with_model(name):
        raise SettingsError(f"{what} ({reason}): {would_do}")
    from mlflow.store.artifact.utils.models import _parse_model_uri
    from mlflow.utils.validation import _validate_model_name

    _refused(what, would_do, _validate_model_name, name)
    if _parse_model_uri(f"models:/{name}/1").name != name or _parse_model_uri(f"models:/{name}@a").name != name:
        raise SettingsError(f"{what} (models:/{name}/1 names another model): {would_do}")


def _trouble_with_model(name: str) -> str:
    if len(name) > _LONGEST_MODEL:
        return f"it has {len(name)} characters, {_LONGEST_MODEL} are taken"
    if name != name.strip() or any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
        return "it has spaces at its ends, or control characters"
    if name in ("", ".", ".."):
        return "it is empty, or means a folder"
    if wrong := sorted(set(name) & set("/:@?%'\"`\\")):
        return f"MLflow cannot be asked for a name with {' '.join(wrong)} in it"
    return ""


def check_alias(alias: str) -> None:
    """Refuse an alias that no version of a model can have.

    Raises:
        SettingsError: it is one.
    """
    _check_alias_here(alias)
    from mlflow.utils.validation import _validate_model_alias_name, _validate_model_alias_name_reserved

    for check in (_validate_model_alias_name, _validate_model_alias_name_reserved):
        _refused(f"registry.alias = {alias!r} cannot be an alias", _ALIAS, check, alias)


def _check_alias_here(alias: str) -> None:
    what = f"registry.alias = {alias!r} cannot be an alias"
    if not re.fullmatch(r"[\w-]{1,255}", alias):  # MLflow's own pattern lets a line end pass
        raise SettingsError(f"{what} (1 to 255 letters, digits, '-' and '_' are taken): {_ALIAS}")
    if re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE):
        raise SettingsError(f"{what} (MLflow keeps {alias} for itself): {_ALIAS}")


def check_experiment_name(name: str) -> None:
    """Refuse a name that no experiment can have.

    Raises:
        SettingsError: it is one.
    """
    from mlflow.utils.validation import _validate_experiment_name

    _refused(
        f"MLFLOW_EXPERIMENT_NAME = {name!r} cannot be an experiment's name",
        "at most 500 characters would do",
        _validate_experiment_name,
        name,
    )


def _refused(what: str, would_do: str, check: Callable[[str], Any], value: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        check(value)
    except MlflowException as error:
        raise SettingsError(f"{what} ({error.message.rstrip('.')}): {would_do}") from error
