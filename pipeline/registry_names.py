"""Names that MLflow is given, refused before anything starts where it would refuse them at the end."""

import os
import unicodedata
from collections.abc import Callable
from typing import Any

from cluster.settings import SettingsError

_LONGEST_MODEL = 256
"""Characters of a registered model's name: the column of MLflow's database (SQLite alone does not mind)."""
_LONGEST_RUN = 250
"""As much, of a run's."""


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
    from mlflow.store.artifact.utils.models import _parse_model_uri
    from mlflow.utils.validation import _validate_model_name

    would_do = "letters, digits, spaces, '-', '_' and '.' would do"
    _refused(f"registry.name = {name!r} cannot be a model's name", would_do, _validate_model_name, name)
    reason = ""
    if len(name) > _LONGEST_MODEL:
        reason = f"it has {len(name)} characters, {_LONGEST_MODEL} are taken"
    elif name != name.strip() or any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
        reason = "it has spaces at its ends, or control characters"
    elif set(name) & set("'\"`\\@%"):
        reason = "MLflow cannot be asked for a name with quotes, '@', '%' or a backslash in it"
    elif _parse_model_uri(f"models:/{name}/1").name != name or _parse_model_uri(f"models:/{name}@a").name != name:
        reason = f"models:/{name}/1 names another model"
    if reason:
        raise SettingsError(f"registry.name = {name!r} cannot be a model's name ({reason}): {would_do}")


def check_alias(alias: str) -> None:
    """Refuse an alias that no version of a model can have.

    Raises:
        SettingsError: it is one.
    """
    from mlflow.utils.validation import _validate_model_alias_name, _validate_model_alias_name_reserved

    what, would_do = f"registry.alias = {alias!r} cannot be an alias", "a word such as champion would do"
    if alias != alias.strip():  # MLflow's pattern lets a line end pass
        raise SettingsError(f"{what} (it has spaces at its ends): {would_do}")
    _refused(what, would_do, _validate_model_alias_name, alias)
    _refused(what, would_do, _validate_model_alias_name_reserved, alias)


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
