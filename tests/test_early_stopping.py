"""Early stopping, and which checkpoint is handed over: counted alike with and without restarts."""

import json

import mlflow
import pytest
import torch
from PIL import Image

from cluster.folders import LocalFolder
from data_prep.corpus import Corpus
from models.vit import VisionTransformer
from models.weights import load_into
from pipeline import checkpoints, orphans, packages, tracking
from pipeline.config import EarlyStoppingSettings, EvaluateSettings
from pipeline.early_stopping import STATE, EarlyStopping, ended
from pipeline.evaluate import data_settings
from pipeline.loader import EvalLoader
from pipeline.scoring import score
from pipeline.workers import Worker
from tests.corpora import image_folder, make_corpus
from tests.running import losses, tiny, torchrun, torchrun_killed

NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "given", "ends_after"),
    [
        ([3, 2, 2.5, 1.5, 1.6, 1.7, 1.8], {"patience": 3}, 7),
        ([3, 2, 2.5, 1.5, 1.6, 1.7, 1.8], {"patience": 1}, 3),
        ([3, 2.9, 2.8, 2.7], {"patience": 2, "min_delta": 0.15}, None),  # slow, and yet better
        ([3, 2.9, 2.9, 2.7], {"patience": 2, "min_delta": 0.15}, 3),
        ([0.1, 0.2, 0.2, 0.2], {"patience": 2, "monitor": "heldout/top1"}, 4),
        ([0.1, 0.2, 0.3, 0.4], {"patience": 1, "monitor": "heldout/top5"}, None),
        ([NAN, NAN, NAN], {"patience": 3}, 3),
        ([3, NAN, 2, NAN, NAN], {"patience": 2}, 5),
        ([3, 4, 5, 6], {}, None),
    ],
)
def test_it_ends_after_so_many_evaluations_without_improvement_however_often_it_is_restarted(values, given, ends_after):
    settings = EarlyStoppingSettings(**given)
    for restarts in (False, True):
        counted, found = EarlyStopping(settings, {}), None
        for number, value in enumerate(values, 1):
            counted.judge(number * 10, {settings.monitor: value})
            counted.judge(number * 10, {settings.monitor: value})  # scored again after a crash
            if counted.ended and found is None:
                found = number
            if restarts:
                counted = EarlyStopping(settings, json.loads(json.dumps({STATE: counted.to_json()})))
        assert found == ends_after


def test_with_more_patience_a_run_that_had_ended_goes_on_and_another_score_counts_anew():
    counted = EarlyStopping(EarlyStoppingSettings(patience=2), {})
    for step, value in enumerate([1, 2, 3]):
        counted.judge(step, {"heldout/loss": value})
    state = {STATE: counted.to_json()}
    assert ended(EarlyStoppingSettings(patience=2), state)
    assert not ended(EarlyStoppingSettings(patience=3), state)
    assert not ended(EarlyStoppingSettings(patience=1, monitor="heldout/top1"), state)
    assert not ended(EarlyStoppingSettings(), state)
    assert not ended(EarlyStoppingSettings(patience=1), {}), "a checkpoint of before"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("early")
    corpus = make_corpus(image_folder(root / "images", classes=3, images=12), root / "corpus")
    heldout = image_folder(root / "others", classes=3, images=17)
    for path in heldout.glob("*/00*"):  # other images than those that are learned by heart
        path.unlink()
    return root, corpus, make_corpus(heldout, root / "heldout")


@pytest.mark.slow
def test_a_killed_run_ends_where_it_would_have_and_hands_over_the_best_average(places):
    root, corpus, heldout = places
    words = [
        *tiny(200, 5), "run.workers=1", f"data.corpus={corpus.path}", f"data.heldout={heldout.path}",
        "evaluation.every=4 steps", "early_stopping.patience=4", "early_stopping.monitor=heldout/loss",
        "checkpoint.keep_best=heldout/loss", "checkpoint.keep=1", "registry.name=early", "registry.checkpoint=best",
        "training.ema=0.8", "optimizer.learning_rate=0.01", "data.augment.mixup=0.8",
    ]  # fmt: skip
    straight = torchrun(1, root / "straight", *words, "run.name=run")
    assert straight.returncode == 0, straight.stderr[-3000:]
    run, other = root / "straight" / "runs" / "run", root / "killed" / "runs" / "run"
    result = json.loads((run / "result.json").read_text())
    assert result["early_stopping"]["ended_the_run"]
    assert result["early_stopping"]["best_step"] == result["checkpoint"]["step"] < result["steps"] < 200
    assert result["steps"] == result["checkpoint"]["step"] + 4 * 4
    torchrun_killed(1, root / "killed", other / "metrics.jsonl", result["steps"] - 6, *words, "run.name=run")
    killed = torchrun(1, root / "killed", *words, "run.name=run")
    assert killed.returncode == 0, killed.stderr[-3000:]
    again = json.loads((other / "result.json").read_text())
    same = ("steps", "checkpoint", "early_stopping", "heldout_top1")
    assert {key: again[key] for key in same} == {key: result[key] for key in same}
    assert losses(other / "metrics.jsonl") == losses(run / "metrics.jsonl")
    with Image.open(run / "first_batch.png") as picture:
        assert " %" in picture.info["Description"], (
            "what the model gets: mixed images, with the shares of their classes"
        )

    tracking.connect(root / "straight")
    package = packages.load_package(result["model"])
    best = checkpoints.best(LocalFolder(run / "checkpoints"), "heldout/loss")
    assert best is not None
    assert "ema" in best.parts().states() or any("ema" in state for state in best.parts().states())
    average = checkpoints.full_weights(best)
    assert all(torch.equal(package.state[name], average[name]) for name in average)
    assert scores_of(package, heldout) == pytest.approx(
        (result["heldout_top1"], result["checkpoint"]["scores"]["heldout/loss"]), rel=1e-5
    ), "the average is what was scored"

    client = mlflow.MlflowClient()
    version = client.get_model_version("early", "1")
    assert version.tags["vitforge.checkpoint"] == "best"
    assert version.tags["vitforge.steps"] == str(result["checkpoint"]["step"])
    assert f"top-1 **{100 * result['heldout_top1']:.2f} %**" in version.description
    (logged,) = orphans.models_of(version)
    scored = {(one.key, one.step, one.dataset_name): one.value for one in client.get_logged_model(logged).metrics}
    assert scored["heldout/top1", result["checkpoint"]["step"], "heldout"] == result["heldout_top1"]
    inputs = client.get_run(version.run_id).inputs.dataset_inputs
    assert {one.dataset.name: one.tags[0].value for one in inputs} == {"corpus": "training", "heldout": "validation"}


def scores_of(package: packages.Package, corpus: Corpus) -> tuple[float, float]:
    model = VisionTransformer(package.config)
    load_into(model, package.state)
    settings = data_settings(package, EvaluateSettings(model="", corpus=str(corpus.path)))
    loader = EvalLoader(corpus, settings, Worker(), 16, "cpu", package.preprocessing)
    found = score(model, loader, "softmax", torch.float32)
    assert found is not None
    return found.top1, found.loss
