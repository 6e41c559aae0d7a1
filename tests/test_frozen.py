"""What older versions wrote (tests/frozen/) opens, goes on with the same losses and gives the same answers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import xxhash

from cluster.folders import LocalFolder
from data_prep.corpus import Corpus
from models.weights import load_safetensors
from pipeline import packages
from pipeline.checkpoints import newest
from pipeline.tracking import metrics_of
from tests.running import REPOSITORY, environment, losses, torchrun

FROZEN = Path(__file__).parent / "frozen"
CORPORA = json.loads((FROZEN / "corpora-expected.json").read_text())
CLOSE = 1e-5
"""Relative: another processor rounds differently; another crop or operation changes a loss by a thousandth."""


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """A copy that may be written to."""
    return shutil.copytree(FROZEN, tmp_path_factory.mktemp("frozen") / "frozen")


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus_opens_and_holds_what_it_held(frozen, name):
    expected = CORPORA[name]
    corpus = Corpus.open(LocalFolder(frozen / "corpora" / name))
    assert (corpus.corpus_hash, corpus.label_kind) == (expected["corpus_hash"], expected["label_kind"])
    assert list(corpus.classes) == expected["classes"]
    found = {}
    for sample in range(len(corpus)):
        _, classes, weights = corpus.labels_of([sample])
        labels = {
            corpus.classes[number]: round(float(weight), 6) for number, weight in zip(classes, weights, strict=True)
        }
        image = xxhash.xxh3_128_hexdigest(corpus.read([sample])[0].tobytes())
        found[corpus.origin(sample)] = {"labels": labels, "image": image}
    assert found == expected["samples"]


def test_a_corpus_is_verified_by_the_command(frozen):
    done = subprocess.run(
        [sys.executable, "data_prep/verify.py", str(frozen / "corpora" / "multi")],
        cwd=REPOSITORY, env=environment(frozen / "home"), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "finetune"])
def test_a_run_goes_on_with_the_losses_that_it_had(frozen, tmp_path, name):
    """The fine-tuning without its parent, which no registry has any more."""
    run = shutil.copytree(frozen / "runs" / name, tmp_path / "home" / "runs" / name)
    expected = json.loads((run / "expected.json").read_text())
    first = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(first) == 10
    words = [word.replace("FROZEN", str(frozen)) for word in expected["words"]]
    done = torchrun(expected["ranks"], tmp_path / "home", *words, f"run.name={name}", "log.every=1")
    assert done.returncode == 0, done.stderr[-4000:]
    assert losses(run / "metrics.jsonl") == pytest.approx(
        {int(step): loss for step, loss in expected["losses"].items()}, rel=CLOSE
    )
    end = newest(LocalFolder(run / "checkpoints"))
    assert end is not None
    assert end.step == 20
    assert end.state["settings"]["data"]["rules"] == 1  # which only the checkpoint of step 10 can have said
    scores = {
        str(row["step"]): {key: value for key, value in row.items() if key.startswith("heldout/")}
        for row in metrics_of(LocalFolder(run)) if "heldout/top1" in row
    }  # fmt: skip
    assert scores.keys() == expected["scores"].keys()
    for step, values in expected["scores"].items():
        assert scores[step] == pytest.approx(values, rel=CLOSE)


def test_a_package_answers_as_it_did_by_its_own_code_and_by_ours(frozen):
    expected = json.loads((frozen / "package-answers.json").read_text())
    images = [(frozen / "images" / name).read_bytes() for name in expected]
    own = mlflow.pyfunc.load_model(str(frozen / "package")).predict(
        pd.DataFrame({"image": images}), params={"top_k": 3}
    )
    package = packages.load_package(str(frozen / "package"))
    state = load_safetensors(frozen / "package" / "artifacts" / "weights.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in package.state.items()} == {
        name: tuple(tensor.shape) for name, tensor in state.items()
    }
    for row, answer in enumerate(expected.values()):
        assert list(own["classes"][row]) == answer["classes"]
        assert np.allclose(own["probabilities"][row], answer["probabilities"], rtol=CLOSE)
    ours = _probabilities(package, images)
    for row, answer in enumerate(expected.values()):
        named = dict(zip(package.classes, ours[row].tolist(), strict=True))
        assert [named[name] for name in answer["classes"]] == pytest.approx(answer["probabilities"], rel=CLOSE)


def _probabilities(package, images):
    import torch

    from models.vit import VisionTransformer
    from models.weights import load_into

    model = VisionTransformer(package.config)
    load_into(model, package.state)
    with torch.no_grad():
        return model.eval()(package.preprocessing(images)).softmax(1)
