"""A package's answers to what people and MLflow's own tools ask: its scoring server, its evaluation."""

import base64
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from fastapi.testclient import TestClient
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from PIL import Image

from models.classifier import load_classifier
from models.preprocess import Preprocessing
from models.vit import VisionTransformer, VitConfig
from models.weights import load_into
from pipeline import packages
from pipeline.config import EvaluateSettings
from pipeline.evaluate import data_settings
from pipeline.loader import EvalLoader
from pipeline.scoring import score
from pipeline.workers import Worker
from tests.corpora import encoded, image_folder, make_corpus

CONFIG = VitConfig(image_size=32, patch_size=8, width=48, depth=2, mlp_dim=96, heads=4, num_classes=3)
URI = "models:/answers@champion"
FILES = [encoded(seed, (40 + seed, 30), "PNG") for seed in range(4)]
TEXTS = [base64.b64encode(file).decode() for file in FILES]
LISTS = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).tolist() for file in FILES]

IMAGES: dict[str, list[Any]] = {
    "base64": TEXTS,
    "base64, URL-safe, not filled up": [base64.urlsafe_b64encode(file).decode().rstrip("=") for file in FILES],
    "data URI": [f"data:image/png;base64,{text}" for text in TEXTS],
    "b64": [{"b64": text} for text in TEXTS],
    "lists": LISTS,
}
BODIES: dict[str, Callable[[list[Any]], Any]] = {
    "dataframe_split": lambda images: {"columns": ["id", "image"], "data": [[7, image] for image in images]},
    "dataframe_records": lambda images: [{"image": image} for image in images],
    "instances": lambda images: [{"image": image} for image in images],
    "inputs": lambda images: {"image": images},
    "inputs, rows": lambda images: [{"image": image} for image in images],
    "inputs, bare": lambda images: images,
    "instances, bare": lambda images: images,
}


@pytest.fixture(scope="module", autouse=True)
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A registry with a model that knows the classes of a corpus."""
    folder = tmp_path_factory.mktemp("answers")
    corpus = make_corpus(image_folder(folder / "images", classes=3, images=20), folder / "corpus")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    experiment = mlflow.create_experiment("answers", artifact_location=(folder / "artifacts").as_uri())
    mlflow.set_experiment(experiment_id=experiment)
    torch.manual_seed(1)
    state = VisionTransformer(replace(CONFIG, num_classes=3)).state_dict()
    torch.nn.init.normal_(state["head.weight"])
    run = mlflow.MlflowClient().create_run(experiment).info.run_id
    packages.publish(
        "answers", state, CONFIG, Preprocessing(32, decoding="dali"), corpus.names, "softmax",
        tags={}, run_id=run, alias="champion",
    )  # fmt: skip
    yield corpus
    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def model(corpus: Any) -> Any:
    return mlflow.pyfunc.load_model(URI)


@pytest.fixture(scope="module")
def server(model: Any) -> TestClient:
    return TestClient(scoring_server.init(model))


COLUMNS = ("classes", "probabilities")


def plain(answer: pd.DataFrame) -> list[tuple[list[str], list[float]]]:
    return [(list(names), list(values)) for names, values in zip(*map(answer.get, COLUMNS), strict=True)]


def about(answer: pd.DataFrame) -> list[tuple[list[str], Any]]:
    return [(names, pytest.approx(values, abs=1e-6)) for names, values in plain(answer)]


@pytest.mark.parametrize(
    ("kind", "form"),
    [(kind, form) for kind in IMAGES for form in BODIES if kind != "b64" or not form.endswith("bare")],  # see below
)
def test_the_server_takes_images_as_people_send_them(model: Any, server: TestClient, kind: str, form: str):
    images = IMAGES[kind]
    if kind == "lists" and form.startswith("instances"):
        images = [image[:30] for image in [[row[:40] for row in image] for image in LISTS]]  # MLflow: of one size
    response = server.post("/invocations", json={form.partition(",")[0]: BODIES[form](images), "params": {"top_k": 2}})
    assert response.status_code == 200, response.text[-600:]
    arrays = [np.array(image, np.uint8) for image in images] if kind == "lists" else FILES
    expected = model.unwrap_python_model().classify(arrays, 2)
    assert [(row["classes"], row["probabilities"]) for row in response.json()["predictions"]] == about(expected)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"instances": [{"b64": TEXTS[0]}]}, "the request has no column `image`"),
        ({"dataframe_records": [{"picture": TEXTS[0]}]}, "the request has no column `image`"),
        ({"dataframe_split": {"data": [[TEXTS[0]]]}}, "the request has no column `image`"),
        ({"inputs": {"image": ["http://example.org/cat.jpg"]}}, "files and addresses are not opened"),
        ({"inputs": {"image": ["/data/cat.jpg", "/data/dog.jpg"]}}, "image 0: a text that is no base64 ('/data/cat"),
        ({"instances": [{"image": {"url": "http://example.org"}}]}, "image 0: an object with url in it"),
        ({"dataframe_records": [{"image": [[[1, 2, 3]], [[1]]]}]}, "image 0: lists of unequal length"),
    ],
)
def test_the_server_says_what_it_takes_where_it_refuses(server: TestClient, body: dict[str, Any], reason: str):
    response = server.post("/invocations", json=body)
    assert response.status_code == 400
    message = response.json()["message"]
    assert reason in message
    assert '{"instances": [{"image": ...}]}' in message


def test_pillows_images_are_taken_in_this_process(model: Any):
    frame = pd.DataFrame({"image": FILES})
    opened = pd.DataFrame({"image": pd.Series([Image.open(io.BytesIO(file)) for file in FILES], dtype=object)})
    assert plain(model.predict(opened)) == about(model.predict(frame))
    own = load_classifier(mlflow.artifacts.download_artifacts(URI), device="cpu")
    assert own.classify(Image.open(io.BytesIO(FILES[0]))) == own.classify(FILES[:1])


def labelled(corpus: Any) -> pd.DataFrame:
    samples = range(corpus.num_samples)
    labels = [corpus.names[int(corpus.labels_of([sample])[1][0])] for sample in samples]
    return pd.DataFrame({"image": [corpus.read([sample])[0].tobytes() for sample in samples], "label": labels})


@pytest.mark.filterwarnings("ignore")  # of MLflow and scikit-learn
def test_mlflows_evaluation_of_the_registrys_address_gives_our_top_1(corpus: Any):
    package = packages.load_package(URI)
    network = VisionTransformer(package.config)
    load_into(network, package.state)
    settings = data_settings(package, EvaluateSettings(model=URI, corpus=str(corpus.path)))
    ours = score(
        network, EvalLoader(corpus, settings, Worker(), 16, "cpu", package.preprocessing), "softmax", torch.float32
    )
    assert ours is not None
    data = labelled(corpus)
    result = mlflow.models.evaluate(URI, data, targets="label", model_type="classifier")
    assert result.metrics["accuracy_score"] == ours.top1
    assert 0 < ours.top1 < 1
    numbers = data.assign(label=[corpus.names.index(name) for name in data["label"]])
    told = mlflow.models.evaluate(
        URI, numbers, targets="label", model_type="classifier", model_config={"output": "index"}
    )
    assert told.metrics["accuracy_score"] == ours.top1


def test_the_form_of_the_answer_can_be_chosen(model: Any):
    frame = pd.DataFrame({"image": FILES}, index=[3, 5, 7, 9])
    usual = model.predict(frame)
    assert list(usual.columns) == list(COLUMNS)
    best = [names[0] for names in usual["classes"]]
    for output, wanted in (("label", best), ("index", [["c0", "c1", "c2"].index(name) for name in best])):
        answer = mlflow.pyfunc.load_model(URI, model_config={"output": output}).predict(frame)
        assert answer.to_dict() == dict(zip(frame.index, wanted, strict=True))
    with pytest.raises(MlflowException, match="output = 'best' must be one of 'top_k', 'label', 'index'"):
        mlflow.pyfunc.load_model(URI, model_config={"output": "best"})


def test_the_example_inside_a_package_is_one_that_its_server_takes(server: TestClient):
    folder = Path(mlflow.artifacts.download_artifacts(URI))
    body = json.loads((folder / "serving_input_example.json").read_text())
    assert len(server.post("/invocations", json=body).json()["predictions"]) == 1
