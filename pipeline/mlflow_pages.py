"""What MLflow's pages show beside metrics and files: the data a run was trained on, how good its model is, whose child.

All of it is for people; a server that does not take it costs a warning, and the next start of the run says it again.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

from cluster.command import log
from cluster.redact import without_credentials
from data_prep.corpus import Corpus
from data_prep.mixture import Mixture
from models.presets import count_parameters
from models.vit import VitConfig
from pipeline import orphans
from pipeline.mlflow_environment import EXPERIMENT
from pipeline.run_description import model_name

KIND = ("mlflow.experimentKind", "custom_model_development")
"""Tag of an experiment, and its value for models: MLflow 3.17's page may otherwise open with traces of chats."""
CHILDREN = "vitforge.children"
"""Tag of a model version: those that were fine-tuned from it, the newest last."""
_MOST_CHILDREN = 50
_DIGEST = 36
"""Characters that MLflow keeps of a data set's digest."""


@dataclass(frozen=True)
class Facts:
    """What a model version's page says of it."""

    architecture: VitConfig
    corpus: Mixture
    heldout: Mixture | None
    scores: Mapping[str, float]
    """Of the weights that were published, by name (heldout/top1, ...); empty where nothing was scored."""
    step: int
    """Of these weights."""
    trained: int
    """Steps that were taken."""
    total: int
    """Steps of the whole duration."""
    average: bool
    """Whether they are an average."""
    parent: str | None
    """models:/NAME/VERSION that it was fine-tuned from."""


def _for_people(action: Callable[..., None]) -> Callable[..., None]:
    @wraps(action)
    def tried(*arguments: Any) -> None:
        try:
            action(*arguments)
        except Exception as error:  # MLflow lets those of its stores through
            first = without_credentials(str(error).partition("\n")[0])
            log.warning("MLflow did not take all of what its pages show of this run (%s)", first)

    return tried


@_for_people
def name_inputs(run_id: str, corpus: Mixture, heldout: Mixture | None, parent: str | None) -> None:
    """Record what a run is made from: the corpora as data sets, and the logged model of its parent. Once is enough."""
    import mlflow
    from mlflow.entities import DatasetInput, InputTag, LoggedModelInput

    client = mlflow.MlflowClient()
    experiment = client.get_experiment(client.get_run(run_id).info.experiment_id)
    if experiment.name == EXPERIMENT and KIND[0] not in experiment.tags:  # others are somebody's
        client.set_experiment_tag(experiment.experiment_id, *KIND)
    inputs = [
        DatasetInput(_dataset(part), [InputTag("mlflow.data.context", context)])
        for mixture, context in ((corpus, "training"), (heldout, "validation"))
        for part in (mixture.parts if mixture else ())
    ]
    there = {(one.dataset.name, one.dataset.digest) for one in client.get_run(run_id).inputs.dataset_inputs}
    new = [one for one in inputs if (one.dataset.name, one.dataset.digest) not in there]
    model = _logged_model(parent)
    known = {one.model_id for one in client.get_run(run_id).inputs.model_inputs}
    models = [LoggedModelInput(model)] if model and model not in known else []
    if new or models:
        client.log_inputs(run_id, new, models=models)


def _dataset(corpus: Corpus) -> Any:
    """A corpus as MLflow's data set: its folder's name, and of its identity as much as MLflow keeps."""
    from mlflow.entities import Dataset

    url = without_credentials(corpus.url)
    columns = [{"type": "binary", "name": "image", "required": True}, {"type": "string", "name": "label"}]
    return Dataset(
        name=corpus.name,
        digest=corpus.corpus_hash[:_DIGEST],
        source_type="s3" if url.startswith("s3://") else "local",
        source=json.dumps({"uri": url}),
        schema=json.dumps({"mlflow_colspec": columns}),
        profile=json.dumps(
            {"num_rows": corpus.num_samples, "num_classes": len(corpus.classes), "labels": corpus.label_kind}
        ),
    )


@_for_people
def describe_version(name: str, version: str, run_id: str, facts: Facts, general: str) -> None:
    """Say on a model version's page what it is and how good, on its logged model's too, and on its parent's page.

    Args:
        general: what the description of every version says.
    """
    import mlflow

    client = mlflow.MlflowClient()
    client.update_model_version(name, version, f"{description(facts)}\n\n{general}")
    for key, value in facts.scores.items():
        client.set_model_version_tag(name, version, f"vitforge.{key.replace('/', '_')}", f"{value:.6g}")
    _score_logged_model(client, f"models:/{name}/{version}", run_id, facts)
    if facts.parent and (parent := _parts(facts.parent)):
        _name_child(client, parent, f"models:/{name}/{version}")


def description(facts: Facts) -> str:
    """What a model version is: its architecture, its accuracy, its data, its parent. In Markdown."""
    config = facts.architecture
    lines = [
        f"{model_name(config)} at {config.image_size} px: {count_parameters(config) / 1e6:,.3g} M parameters, "
        f"{config.num_classes:,} classes."
    ]
    if facts.scores:
        scores = facts.scores
        shares = {"heldout/top1": "top-1"} | ({"heldout/top5": "top-5"} if config.num_classes > 5 else {})
        parts = [f"{what} **{100 * scores[key]:.2f} %**" for key, what in shares.items() if key in scores]
        if "heldout/loss" in scores:
            parts.append(f"loss {scores['heldout/loss']:.4f}")
        lines.append(f"Held-out {', '.join(parts)}{_on(facts.heldout)}.")
    else:
        lines.append("Nothing was held out to score it on.")
    trained = "" if facts.trained == facts.step else f"; training ended at step {facts.trained:,}"
    lines.append(
        f"{'The average of the weights' if facts.average else 'The weights'} of step {facts.step:,} of "
        f"{facts.total:,}{trained}, trained{_on(facts.corpus)}."
    )
    if facts.parent:
        lines.append(f"Fine-tuned from {_link(facts.parent)}.")
    return "\n\n".join(lines)


def _on(mixture: Mixture | None) -> str:
    if mixture is None:
        return ""
    names = ", ".join(f"`{part.name}`" for part in mixture.parts)
    return f" on {names} ({mixture.num_samples:,} images, {mixture.corpus_hash[:12]})"


def _link(uri: str) -> str:
    """A version, as a link on MLflow's own pages where it is one of the registry."""
    parts = _parts(uri)
    return f"[{uri}](#/models/{parts[0]}/versions/{parts[1]})" if parts and " " not in uri else f"`{uri}`"


def _parts(uri: str) -> tuple[str, str] | None:
    """Name and version of models:/NAME/VERSION."""
    if not uri.startswith("models:/"):
        return None
    name, _, version = uri.removeprefix("models:/").rpartition("/")
    return (name, version) if name and version.isdigit() else None


def _logged_model(uri: str | None) -> str | None:
    """The logged model that a version is made of; None where the registry does not say."""
    import mlflow

    parts = _parts(uri) if uri else None
    if parts is None:
        return None
    return min(orphans.models_of(mlflow.MlflowClient().get_model_version(*parts)), default=None)


def _score_logged_model(client: Any, uri: str, run_id: str, facts: Facts) -> None:
    """The scores as metrics of the logged model, on the data that they are of: the run's own points, not new ones."""
    from mlflow.entities import Metric

    model = _logged_model(uri)
    if model is None or not facts.scores:
        return
    known = {metric.key for metric in client.get_logged_model(model).metrics or []}
    of = {}
    if facts.heldout is not None and len(facts.heldout.parts) == 1:
        dataset = _dataset(facts.heldout.parts[0])
        of = {"dataset_name": dataset.name, "dataset_digest": dataset.digest}
    points: list[Any] = []
    for key in facts.scores.keys() - known:
        points += [
            Metric(key, point.value, point.timestamp, point.step, model_id=model, run_id=run_id, **of)
            for point in client.get_metric_history(run_id, key)
            if point.step == facts.step
        ][:1]
    if points:
        client.log_batch(run_id, metrics=points)


def _name_child(client: Any, parent: Sequence[str], child: str) -> None:
    """Add a version to those that its parent names. Two that do it at once may lose one: `vitforge.parent` stays."""
    name, version = parent
    children = [
        uri
        for uri in client.get_model_version(name, version).tags.get(CHILDREN, "").split(", ")
        if uri and uri != child
    ]
    client.set_model_version_tag(name, version, CHILDREN, ", ".join([*children, child][-_MOST_CHILDREN:]))
