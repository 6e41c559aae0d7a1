"""Weights of labels that the loss cannot use, and a corpus of one class: refused by what would use them."""

import dataclasses
import sys

import mlflow
import numpy as np
import pytest
import torch

from cluster.folders import LocalFolder
from data_prep.append import what_is_new
from data_prep.columns import Labels
from data_prep.convert import Conversion
from data_prep.corpus import Corpus
from data_prep.corpus_assembly import assemble
from data_prep.corpus_format import PLAN
from data_prep.listing import SourceError
from data_prep.mixture import Mixture
from data_prep.shard_plan import Plan
from data_prep.shard_task import write_shard
from data_prep.source_settings import SourceSettings
from data_prep.sources import list_source
from data_prep.target_weights import LabelWeightError, check_batch_weights, check_weights
from models.losses import dense_targets, sigmoid_cross_entropy
from models.preprocess import Preprocessing
from models.vit import VisionTransformer, VitConfig
from pipeline import evaluate, finetune, packages, pretrain, stage, tracking
from pipeline.data_config import DataSettings
from pipeline.loader import EvalLoader, TrainLoader
from pipeline.workers import Worker
from tests.corpora import image_folder, make_corpus

THIRD = (0.5,) * 3


def weighted(root, labels) -> Corpus:
    """A corpus of two classes with these labels for each image: (class, weight) pairs, whatever their weights.

    Written by what writes all corpora, as versions of it did that looked at no weight.
    """
    listing = list_source(SourceSettings(source=str(image_folder(root / "images", 2, len(labels) // 2))))
    listing = dataclasses.replace(listing, labels=Labels.of(labels))
    plan = Plan(listing, None, 10_000, seed=0)
    there = LocalFolder(root / "corpus")
    there.write_bytes(PLAN, b"{}")
    assemble(there, plan, [write_shard(plan.task(shard, there)) for shard in range(len(plan))])
    return Corpus.open(there)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return weighted(tmp_path_factory.mktemp("usual"), [[(0, 1.0)], [(0, 0.25), (1, 0.75)], [(1, 0.0)], []])


@pytest.fixture(scope="module")
def per_cent(tmp_path_factory):
    return weighted(tmp_path_factory.mktemp("per-cent"), [[(0, 1.0)], [(0, 25.0), (1, 75.0)], [(1, 1.0)], []])


@pytest.fixture(scope="module")
def negative(tmp_path_factory):
    return weighted(tmp_path_factory.mktemp("negative"), [[(0, 1.0)], [(0, -1.0)], [(1, 1.0)], []])


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("VITFORGE_HOME", str(tmp_path / "home"))
    for name in ("MLFLOW_TRACKING_URI", "RANK"):
        monkeypatch.delenv(name, raising=False)


def error_of(monkeypatch, module, *words):
    monkeypatch.setattr(sys, "argv", [module.__name__, *words])
    monkeypatch.setattr(stage, "run_ranks", lambda *arguments, **options: pytest.fail("the ranks would start"))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the message is what the tests are about
        module.main()
    return str(caught.value)


def test_nothing_is_appended_to_a_corpus_of_per_cent(per_cent, usual):
    listing = list_source(SourceSettings(source=usual.url))
    with pytest.raises(LabelWeightError, match=r"weight 25\. .*weight_scale=0\.01"):
        what_is_new(listing, LocalFolder(per_cent.path), Conversion())
    with pytest.raises(SourceError, match=r"label 'c[01]' of '.*' has weight (25|75): .*weight_scale=0\.01"):
        list_source(SourceSettings(source=per_cent.url))
    scaled = list_source(SourceSettings(source=per_cent.url, weight_scale=0.01))
    assert isinstance(scaled.labels, Labels)
    assert sorted(scaled.labels.rows["weight"].tolist()) == pytest.approx([0.01, 0.01, 0.25, 0.75])


def test_beyond_one_the_loss_has_no_bound():
    targets = dense_targets(np.array([0]), np.array([0]), np.array([100.0], np.float32), 1, 2)
    assert sigmoid_cross_entropy(torch.tensor([[1000.0, 0.0]]), targets) < -90_000


def test_weights_within_their_bounds_are_taken(usual):
    check_weights(Mixture.of(usual))


@pytest.mark.parametrize("key", ["data.corpus", "data.mixture", "data.heldout"])
def test_a_corpus_with_weights_in_per_cent_is_refused_at_the_start(home, usual, per_cent, monkeypatch, key):
    words = {
        "data.corpus": [f"data.corpus={per_cent.path}"],
        "data.mixture": [
            "data.corpus=null",
            f"data.mixture=[{{corpus: {usual.path}, weight: 1}}, {{corpus: {per_cent.path}, weight: 1}}]",
        ],
        "data.heldout": [f"data.corpus={usual.path}", f"data.heldout={per_cent.path}"],
    }[key]
    said = error_of(monkeypatch, pretrain, "demo", *words, "loss.kind=sigmoid", "training.global_batch=2")
    for part in (f"{per_cent.path}: sample ", ".JPEG)", "with weight 25", "'c0'", f"shard.py {per_cent.path} NEW"):
        assert part in said
    assert "weight_scale=0.01" in said


def test_nothing_is_scored_on_weights_in_per_cent(home, per_cent, monkeypatch):
    tracking.connect(stage.home_folder(""))
    architecture = VitConfig(16, 4, width=8, depth=1, mlp_dim=8, heads=1, num_classes=2)
    run = mlflow.MlflowClient().create_run("0").info.run_id
    weights = VisionTransformer(architecture).state_dict()
    version = packages.publish(
        "tags", weights, architecture, Preprocessing(16), per_cent.names, "sigmoid", tags={}, run_id=run
    )
    said = error_of(monkeypatch, evaluate, version.uri, str(per_cent.path))
    assert f"{per_cent.path}: sample " in said
    assert "with weight 25" in said


def test_weights_below_zero_are_refused_too(home, negative, monkeypatch):
    with pytest.raises(LabelWeightError, match=r"'c0' with weight -1.*without weights below 0"):
        check_weights(Mixture.of(negative))


@pytest.mark.parametrize("loader", ["train", "evaluate"])
def test_what_the_start_did_not_see_no_batch_gets(per_cent, loader):
    data = DataSettings(corpus=str(per_cent.path), image_size=16, mean=THIRD, std=THIRD, decode="cpu", decode_threads=1)
    batches = (
        TrainLoader(per_cent, data, 0, Worker(), 4, 4, 0, 1, "cpu", [])
        if loader == "train"
        else EvalLoader(per_cent, data, Worker(), 4, "cpu")
    )
    with pytest.raises(LabelWeightError, match=r"sample \d .*with weight (25|75)"):
        list(batches)


def test_a_class_that_an_image_has_twice_counts_with_both_weights(tmp_path):
    twice = weighted(tmp_path, [[(0, 0.75), (0, 0.5)], [(0, 0.5), (1, 0.5)]])
    where = [twice.origin(sample) for sample in range(2)]
    both, second = np.arange(2), np.array([where.index("c1/000.JPEG")])
    with pytest.raises(LabelWeightError, match=r"\(c0/000.JPEG\) .*'c0' with weight 1\.25.*weight_scale=0\.8"):
        check_batch_weights(Mixture.of(twice), both, *twice.labels_of(both))
    check_batch_weights(Mixture.of(twice), second, *twice.labels_of(second))


@pytest.mark.parametrize("stage_of", [pretrain, finetune])
def test_one_class_is_nothing_to_learn(home, tmp_path, monkeypatch, stage_of):
    one = make_corpus(image_folder(tmp_path / "images", classes=1, images=8), tmp_path / "corpus")
    said = error_of(monkeypatch, stage_of, "demo", f"data.corpus={one.path}", "training.global_batch=8")
    for part in (str(one.path), "one class, 'c0'", "nothing to learn", "a folder for each"):
        assert part in said
