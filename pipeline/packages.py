"""Model packages: what a stage hands over, through the MLflow model registry.

A package is an MLflow model without pickle and without a dependency on this project:

    MLmodel, requirements.txt, ...     MLflow's own
    predictor.py                       pipeline/predictor.py as it was
    artifacts/weights.safetensors      the parameters
    artifacts/model.json               architecture, preprocessing, class names, activation
    artifacts/code/vit.py, preprocess.py, classifier.py    models/ as it was

MLflow runs the code inside a package when it loads one. What is here reads weights and description only, and compares
all of the files with the digest that the version was published with.

The registry is the one that `mlflow.set_tracking_uri` was told.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import mlflow
import pandas as pd
import torch
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import AnyType, Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema
from PIL import Image
from pydantic import Field
from torch import Tensor

import models.classifier
import models.preprocess
import models.vit
from cluster.command import log
from cluster.marked_folders import temporary_files_in, temporary_folder
from cluster.records import Record, check_record
from cluster.redact import without_credentials
from cluster.storage import StorageError, read_json
from models.classifier import DTYPES, FORMAT_VERSION, ClassifierError, package_digest
from models.preprocess import Preprocessing
from models.vit import VisionTransformer, VitConfig
from models.weights import check_fits, load_safetensors, save_safetensors
from pipeline import orphans
from pipeline.registry_names import check_alias, check_model_name
from pipeline.scratch import room_to_read

WEIGHTS_TAG = "vitforge.weights"
"""Tag of a model version: sha256 of its weights.safetensors."""
PACKAGE_TAG = "vitforge.package"
"""Tag of a model version: `package_digest` of all of its files. Versions of before have none."""

DESCRIPTION = f"""A Vision Transformer made by Vitforge.

`mlflow.pyfunc.load_model` runs the Python files inside this package, as it does for every MLflow model: load it if you
trust this registry and the store of its files. The tag `{PACKAGE_TAG}` is a digest of all of its files
(but of what Python compiles into `__pycache__`: remove that, if it lies in a copy of yours, before you run the code).
`models.classifier.load_classifier(FOLDER, digest=TAG)` of Vitforge compares them with it and runs none of them.
"""
"""Of a model version, where its consumers read."""

Activation = Literal["softmax", "sigmoid"]

_REQUIREMENTS = ("mlflow", "torch", "numpy", "pandas", "pillow")


class PackageError(ValueError):
    """A package that does not exist, is damaged or cannot be published; the message says what would do."""


@dataclass(frozen=True)
class PublishedVersion:
    """A model version in the registry."""

    name: str
    version: str
    tags: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def uri(self) -> str:
        """Its address, `models:/NAME/VERSION`, which will never mean another version."""
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True)
class Package:
    """What a package holds, for fine-tuning and evaluation."""

    state: dict[str, Tensor]
    config: VitConfig
    preprocessing: Preprocessing
    classes: list[str]
    activation: Activation
    uri: str
    """`models:/NAME/VERSION`, resolved; the folder's path for a package that was read from a folder."""
    tags: dict[str, str]
    """Of the model version; empty for a package that was read from a folder."""


# ----------------------------------------------------------------------------------------------------------------
# Publishing
# ----------------------------------------------------------------------------------------------------------------


def publish(
    name: str,
    state: Mapping[str, Tensor],
    config: VitConfig,
    preprocessing: Preprocessing,
    classes: Sequence[str],
    activation: Activation,
    *,
    tags: Mapping[str, str],
    run_id: str,
    alias: str | None = None,
) -> PublishedVersion:
    """Write a package, register it as a new version of the model `name`, and give it `alias` once it is ready.

    Publishing the same weights from the same run again returns the version that is there. The alias never moves back
    to an older version.

    Args:
        state: the parameters by name, in the dtype they shall have in the package.
        classes: names in the order of the logits.
        tags: lineage, set on the version as it is created.
        run_id: the MLflow run that the model comes from.

    Raises:
        SettingsError: a name that the registry does not take.
        PackageError: the parts do not fit together, or the registry failed.
    """
    check_model_name(name)
    if alias is not None:
        check_alias(alias)
    _check_parts(state, config, preprocessing, classes, activation)
    with temporary_folder("package") as folder, temporary_files_in(folder), _registry_errors():
        artifacts = _write_parts(folder, state, config, preprocessing, classes, activation)
        tags = {**tags, WEIGHTS_TAG: _sha256(artifacts["weights"])}
        known = version = _find_published(name, run_id, tags[WEIGHTS_TAG])
        if version is None:
            experiment = mlflow.MlflowClient().get_run(run_id).info.experiment_id
            orphans.remove(run_id, experiment)
            logged = mlflow.initialize_logged_model(
                "model", source_run_id=run_id, experiment_id=experiment, tags=orphans.mark()
            )
            example = _example(config.image_size)
            digest = _store(logged, run_id, folder / "package", artifacts, _signature(len(classes)), example)
            version = mlflow.register_model(f"models:/{logged.model_id}", name, tags={**tags, PACKAGE_TAG: digest})
            mlflow.MlflowClient().update_model_version(name, version.version, DESCRIPTION)
        orphans.keep(version)
        _require_ready(version)
        stands = "" if alias is None else _set_alias(name, alias, version)
    log.info("%s models:/%s/%s%s", "registered" if known is None else "there is already", name, version.version, stands)
    return PublishedVersion(name, str(version.version), dict(version.tags))


def _check_parts(
    state: Mapping[str, Tensor],
    config: VitConfig,
    preprocessing: Preprocessing,
    classes: Sequence[str],
    activation: str,
) -> None:
    if len(classes) != config.num_classes:
        raise PackageError(f"{len(classes)} class names for a model with {config.num_classes} outputs")
    if preprocessing.size != config.image_size:
        raise PackageError(f"preprocessing to {preprocessing.size} pixels for a model of {config.image_size}")
    if activation not in ("softmax", "sigmoid"):
        raise PackageError(f"activation = {activation!r} must be 'softmax' or 'sigmoid'")
    with torch.device("meta"):
        check_fits(VisionTransformer(config), state)
    if others := {str(tensor.dtype) for tensor in state.values()} - {str(dtype) for dtype in DTYPES.values()}:
        raise PackageError(f"the weights are {', '.join(sorted(others))}: float32, bfloat16 or float16 would do")
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise PackageError(f"the weights are not finite: {', '.join(broken[:6])}; a package of them is of no use")


def _write_parts(
    folder: Path,
    state: Mapping[str, Tensor],
    config: VitConfig,
    preprocessing: Preprocessing,
    classes: Sequence[str],
    activation: Activation,
) -> dict[str, Path]:
    save_safetensors(state, folder / "weights.safetensors")
    description = {
        "format_version": FORMAT_VERSION,
        "architecture": config.to_json(),
        "preprocessing": preprocessing.to_json(),
        "activation": activation,
        "classes": list(classes),
    }
    (folder / "model.json").write_text(json.dumps(description, indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / "code").mkdir()
    for module in (models.vit, models.preprocess, models.classifier):
        shutil.copy(str(module.__file__), folder / "code")
    return {"weights": folder / "weights.safetensors", "model": folder / "model.json", "code": folder / "code"}


def _store(
    logged: LoggedModel,
    run_id: str,
    folder: Path,
    artifacts: Mapping[str, Path],
    signature: ModelSignature,
    example: pd.DataFrame,
) -> str:
    """Write a package as an MLflow model, try it on an example, store it as `logged`; returns its `package_digest`.

    What `Model.log` does in one, in parts: the digest is taken of the files as they are sent.
    """
    client = mlflow.MlflowClient()
    try:
        mlflow.pyfunc.save_model(
            path=str(folder),
            mlflow_model=Model(
                artifact_path=logged.artifact_location,
                model_uuid=logged.model_id,
                run_id=run_id,
                model_id=logged.model_id,
            ),
            python_model=str(Path(__file__).with_name("predictor.py")),
            model_config={"output": "top_k"},
            artifacts={key: str(path) for key, path in artifacts.items()},
            signature=signature,
            input_example=example,
            pip_requirements=[_pinned(package) for package in _REQUIREMENTS],
        )
        mlflow.pyfunc.load_model(str(folder)).predict(example)
        for compiled in folder.rglob("__pycache__"):
            shutil.rmtree(compiled)
        digest = package_digest(folder)
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        client.log_model_artifacts(logged.model_id, str(folder))
    except BaseException:
        with contextlib.suppress(Exception):
            client.finalize_logged_model(logged.model_id, LoggedModelStatus.FAILED)
        raise
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    return digest


def _signature(num_classes: int) -> ModelSignature:
    """The column `image`. Of a type, MLflow would refuse other forms of images itself, without saying what is taken."""
    return ModelSignature(
        inputs=Schema([ColSpec(AnyType(), "image", required=False)]),
        outputs=Schema([ColSpec(Array(DataType.string), "classes"), ColSpec(Array(DataType.double), "probabilities")]),
        params=ParamSchema([ParamSpec("top_k", DataType.long, min(5, num_classes))]),
    )


def _example(size: int) -> pd.DataFrame:
    """One image as a consumer sends it. MLflow keeps it in the package and tries the package on it."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), (128, 128, 128)).save(file, "PNG")
    return pd.DataFrame({"image": [file.getvalue()]})


def _pinned(package: str) -> str:
    """The installed version as pip finds it: without what follows a plus sign (torch's CPU or CUDA build)."""
    return f"{package}=={importlib.metadata.version(package).partition('+')[0]}"


def _find_published(name: str, run_id: str, weights: str) -> ModelVersion | None:
    if _registered(name) is None:
        return None
    versions = mlflow.MlflowClient().search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    same = [v for v in versions if v.tags.get(WEIGHTS_TAG) == weights and v.status != "FAILED_REGISTRATION"]
    return max(same, key=lambda version: int(version.version), default=None)


def _require_ready(version: ModelVersion) -> None:
    if version.status != "READY":
        raise PackageError(
            f"version {version.version} of {version.name} is {version.status} in the registry, not READY "
            f"({version.status_message or 'it gives no reason'}): delete that version and publish again"
        )


def _set_alias(name: str, alias: str, version: ModelVersion) -> str:
    """Move an alias to a version, never back; says where it stands."""
    client = mlflow.MlflowClient()
    current = client.get_registered_model(name).aliases.get(alias)
    if current is not None and int(current) > int(version.version):
        return f"; @{alias} stays at version {current}, which is newer"
    if current is not None and int(current) == int(version.version):
        return f", which is @{alias} already"
    client.set_registered_model_alias(name, alias, str(version.version))
    return f" as @{alias}" + (f", which was version {current}" if current is not None else "")


# ----------------------------------------------------------------------------------------------------------------
# Loading
# ----------------------------------------------------------------------------------------------------------------


def resolve(uri: str) -> PublishedVersion:
    """The model version that `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `models:/NAME/latest` means now.

    Raises:
        PackageError: there is no such model, alias or version (the message says which there are), or the registry
            does not answer.
    """
    match = re.fullmatch(r"models:/+([^/@]+)(?:@([^/@]+)|/([^/@]+))?", uri)
    if match is None:
        raise PackageError(f"{uri!r} is no model: a folder, models:/NAME@ALIAS or models:/NAME/VERSION would do")
    name, alias, wanted = match.groups()
    _check_reachable()
    with _registry_errors():
        client = mlflow.MlflowClient()
        model = _registered(name)
        if model is None:
            known = sorted(model.name for model in client.search_registered_models())
            raise PackageError(f"no model is called {name!r} in the registry at {_registry()}: {_there_are(known)}")
        versions = {str(version.version): version for version in client.search_model_versions(f"name = '{name}'")}
        aliases = {given: str(number) for given, number in model.aliases.items()}
        numbers = sorted(versions, key=int)
        if alias is not None:
            if alias not in aliases:
                raise PackageError(f"model {name!r} has no alias {alias!r}: {_there_are(sorted(aliases))}")
            wanted = aliases[alias]
        elif wanted == "latest" and numbers:
            wanted = numbers[-1]
        if wanted is None or wanted not in versions:
            trouble = "say which version" if wanted is None else f"model {name!r} has no version {wanted!r}"
            raise PackageError(f"{trouble}: {_there_are(numbers)}; aliases: {', '.join(sorted(aliases)) or 'none'}")
        _require_ready(versions[wanted])
    return PublishedVersion(name, wanted, dict(versions[wanted].tags))


def load_package(uri: str, *, quiet: bool = False) -> Package:
    """A package from the registry (see `resolve`) or from a folder that holds one. None of its code is run.

    Args:
        quiet: do not say of a version of before that it has no digest of all of its files.

    Raises:
        PackageError: as `resolve`; or what is there is no such package, or a damaged one.
        ValueError: its parts do not fit together.
    """
    if not uri.startswith("models:"):
        if not Path(uri).is_dir():
            raise PackageError(
                f"no model package at {uri}: a folder, models:/NAME@ALIAS or models:/NAME/VERSION would do"
            )
        return _read_parts(Path(uri), uri, {})
    version = resolve(uri)
    with room_to_read(uri), temporary_folder("package") as temporary, temporary_files_in(temporary):
        (place := temporary / "package").mkdir()
        with _registry_errors():
            folder = mlflow.artifacts.download_artifacts(artifact_uri=version.uri, dst_path=str(place))
        _check_digest(Path(folder), version, quiet)
        return _read_parts(Path(folder), version.uri, version.tags)


def _check_digest(folder: Path, version: PublishedVersion, quiet: bool) -> None:
    published = version.tags.get(PACKAGE_TAG)
    if published is None:
        if not quiet:
            log.info(
                "%s has no digest of all of its files (%s): only its weights are checked", version.uri, PACKAGE_TAG
            )
        return
    try:
        found = package_digest(folder)
    except ClassifierError as error:
        raise PackageError(f"{version.uri}: {error}") from error
    if found != published:
        raise PackageError(
            f"the files of {version.uri} are not the ones that were published: its {PACKAGE_TAG} differs. Load none of "
            "it with mlflow.pyfunc.load_model, which runs the code inside; find out who changed the store of the models"
        )


def _read_parts(folder: Path, uri: str, tags: dict[str, str]) -> Package:
    description_path = folder / "artifacts" / "model.json"
    if not description_path.is_file():
        raise PackageError(f"{uri} is no package of this project: it has no artifacts/model.json")
    description = _read_description(description_path)
    if description.format_version > FORMAT_VERSION:
        raise PackageError(
            f"{uri} has package format {description.format_version}, newer than the {FORMAT_VERSION} that this "
            "version of the project reads: update it"
        )
    weights = folder / "artifacts" / "weights.safetensors"
    state = load_safetensors(weights)
    if tags.get(WEIGHTS_TAG, digest := _sha256(weights)) != digest:
        raise PackageError(f"the weights of {uri} are not the ones that were published: its {WEIGHTS_TAG} differs")
    try:
        config = VitConfig.from_json(description.architecture)
        preprocessing = Preprocessing.from_json(description.preprocessing)
    except ValueError as error:
        raise PackageError(f"{description_path} describes no model: {error}") from error
    if config.depth > len(state):  # before as many blocks are built
        raise PackageError(f"{weights} has {len(state)} tensors, too few for {config.depth} blocks")
    _check_parts(state, config, preprocessing, description.classes, description.activation)
    return Package(state, config, preprocessing, description.classes, description.activation, uri, tags)


class _Description(Record):
    """What model.json must say."""

    format_version: Annotated[int, Field(ge=1)]
    architecture: dict[str, Any]
    preprocessing: dict[str, Any]
    activation: Activation
    classes: list[str]


def _read_description(path: Path) -> _Description:
    try:
        value = read_json(path)
    except StorageError as error:
        raise PackageError(str(error)) from error
    return check_record(_Description, value, str(path), PackageError)


# ----------------------------------------------------------------------------------------------------------------
# The registry
# ----------------------------------------------------------------------------------------------------------------


def _registry() -> str:
    return without_credentials(str(mlflow.get_registry_uri()))


def _check_reachable() -> None:
    """Ask a server once whether it is there: MLflow itself would try for minutes before it says so."""
    if not _registry().startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(f"{_registry().rstrip('/')}/health", timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError as error:
        raise PackageError(
            f"the MLflow server at {_registry()} does not answer ({getattr(error, 'reason', error)}): start it, or "
            "set MLFLOW_TRACKING_URI to one that runs"
        ) from error


@contextlib.contextmanager
def _registry_errors() -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        raise PackageError(
            f"the model registry at {_registry()} failed: {without_credentials(error.message)}"
        ) from error
    except ModuleNotFoundError as error:  # of a database
        raise PackageError(f"the model registry at {_registry()} needs {error.name}: install it") from error


def _registered(name: str) -> RegisteredModel | None:
    try:
        return mlflow.MlflowClient().get_registered_model(name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _there_are(names: Sequence[str], shown: int = 10) -> str:
    if not names:
        return "there are none yet"
    return f"there are {', '.join(names[:shown])}{' and more' if len(names) > shown else ''}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
