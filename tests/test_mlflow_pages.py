"""What MLflow's pages say of a run and of a version of a model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

from data_prep.mixture import Mixture
from models.preprocess import Preprocessing
from models.vit import VisionTransformer, VitConfig
from pipeline import mlflow_pages, orphans, packages, tracking
from pipeline.mlflow_pages import Facts
from tests.corpora import image_folder, make_corpus

CONFIG = VitConfig(image_size=32, patch_size=8, width=48, depth=1, mlp_dim=96, heads=4, num_classes=3)
SCORES = {"heldout/top1": 0.8125, "heldout/top5": 1.0, "heldout/loss": 0.51}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mixture, Mixture, Path]:
    root = tmp_path_factory.mktemp("pages")
    pets = make_corpus(image_folder(root / "images", classes=3, images=4), root / "pets")
    unseen = make_corpus(image_folder(root / "others", classes=3, images=3), root / "pets-val")
    return Mixture([pets]), Mixture([unseen]), root / "home"


def registered(home: Path, name: str, parent: str | None, corpora: Any) -> tuple[packages.PublishedVersion, str]:
    """A version as the end of a stage makes it, and its run."""
    tracking.connect(home)
    run = tracking.Run("made", None, parent=parent and "0" * 32)
    run.metrics(10, {"heldout/top1": 0.5})
    run.metrics(20, SCORES)
    run.flush()
    corpus, heldout, _ = corpora
    torch.manual_seed(len(name))
    state = VisionTransformer(CONFIG).state_dict()
    version = packages.publish(
        name, state, CONFIG, Preprocessing(32), corpus.names, "softmax", tags={}, run_id=run.run_id
    )
    for _ in range(2):  # as the same command does, started again
        mlflow_pages.name_inputs(run.run_id, corpus, heldout, parent)
        facts = Facts(CONFIG, corpus, heldout, SCORES, 20, 30, 40, True, parent)
        mlflow_pages.describe_version(version.name, version.version, run.run_id, facts, packages.DESCRIPTION)
    return version, run.run_id


def test_a_version_says_how_good_it_is_on_what_and_whose_child_it_is(corpora: Any):
    home = corpora[2]
    parent, _ = registered(home, "backbone", None, corpora)
    client = mlflow.MlflowClient()
    children = [registered(home, name, parent.uri, corpora) for name in ("pets", "cars")]
    child, run = children[0]
    version = client.get_model_version(child.name, child.version)
    assert "81.25 %" in version.description
    assert "on `pets-val` (9 images" in version.description
    assert "trained on `pets` (12 images" in version.description
    assert "The average of the weights of step 20 of 40; training ended at step 30" in version.description
    assert "Fine-tuned from [models:/backbone/1](#/models/backbone/versions/1)." in version.description
    assert "runs the Python files inside this package" in version.description
    assert version.tags["vitforge.heldout_top1"] == "0.8125"
    known = client.get_model_version("backbone", "1").tags[mlflow_pages.CHILDREN]
    assert known == "models:/pets/1, models:/cars/1"

    (model,), (model_of_parent,) = (
        orphans.models_of(version),
        orphans.models_of(client.get_model_version("backbone", "1")),
    )
    metrics = client.get_logged_model(model).metrics
    assert {one.key: (one.value, one.step, one.dataset_name) for one in metrics} == {
        key: (value, 20, "pets-val") for key, value in SCORES.items()
    }
    assert len(metrics) == len(SCORES)
    assert len(client.get_metric_history(run, "heldout/top1")) == 2, "the run has no point more"
    inputs = client.get_run(run).inputs
    assert [one.model_id for one in inputs.model_inputs] == [model_of_parent]
    data = {one.dataset.name: (one.tags[0].value, json.loads(one.dataset.profile)) for one in inputs.dataset_inputs}
    assert data == {
        "pets": ("training", {"num_rows": 12, "num_classes": 3, "labels": "single"}),
        "pets-val": ("validation", {"num_rows": 9, "num_classes": 3, "labels": "single"}),
    }
    assert corpora[0].corpus_hash.startswith(inputs.dataset_inputs[0].dataset.digest)
    source = mlflow.data.get_source(inputs.dataset_inputs[0].dataset)
    assert Path(source.uri) == corpora[0].parts[0].path
    tags = client.get_run(run).data.tags
    assert "mlflow.parentRunId" not in tags, "MLflow's list of runs folds such away"
    assert client.get_experiment_by_name("vitforge").tags[mlflow_pages.KIND[0]] == "custom_model_development"


def test_a_version_that_was_never_scored_says_so(corpora: Any):
    facts = Facts(replace(CONFIG, num_classes=1000), corpora[0], None, {}, 40, 40, 40, False, "/models/a")
    said = mlflow_pages.description(facts)
    assert "Nothing was held out" in said
    assert "The weights of step 40 of 40, trained on" in said
    assert "Fine-tuned from `/models/a`." in said
    scored = mlflow_pages.description(replace(facts, heldout=corpora[1], scores=SCORES))
    assert "top-1 **81.25 %**, top-5 **100.00 %**, loss 0.5100" in scored


def test_a_store_that_does_not_take_it_costs_a_warning(corpora: Any, messages: Any):
    mlflow.set_tracking_uri(f"sqlite:///{corpora[2]}/none.db")
    mlflow_pages.name_inputs("0" * 32, corpora[0], None, None)
    assert "MLflow did not take all of what its pages show" in messages()
