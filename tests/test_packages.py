"""The hand-over: publishing to a real MLflow registry (SQLite), reading back, and a consumer without this project."""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from mlflow.store.artifact.utils.models import get_model_name_and_version as _get_model_name_and_version
from PIL import Image

import models.vit
from cluster.settings import SettingsError
from models.classifier import ClassifierError, load_classifier, package_digest
from models.preprocess import Preprocessing
from models.vit import VisionTransformer, VitConfig
from models.weights import WeightsError, load_safetensors, save_safetensors
from pipeline.packages import PACKAGE_TAG, PackageError, PublishedVersion, load_package, publish, resolve
from pipeline.registry_names import check_names
from pipeline.scratch import check_package_room, room_for_hand_over, temporary_files
from tests.running import REPOSITORY, environment

CONFIG = VitConfig(image_size=32, patch_size=8, width=48, depth=2, mlp_dim=96, heads=4, num_classes=3)
PREPROCESSING = Preprocessing(32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
CLASSES = ["cat", "Hündin", "a, b"]


@dataclass
class Registry:
    """A registry of its own for these tests."""

    folder: Path
    uri: str
    experiment: str

    def new_run(self) -> str:
        return str(mlflow.MlflowClient().create_run(self.experiment).info.run_id)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{folder}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    experiment = mlflow.create_experiment("tests", artifact_location=(folder / "artifacts").as_uri())
    yield Registry(folder, uri, experiment)
    mlflow.set_tracking_uri(None)  # out of the environment too


def weights(seed: int = 0, config: VitConfig = CONFIG) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = VisionTransformer(config)
    torch.nn.init.normal_(model.head.weight)
    return dict(model.state_dict())


def put(name: str, run_id: str, state: dict[str, torch.Tensor] | None = None, **changes: Any) -> PublishedVersion:
    parts: dict[str, Any] = {"config": CONFIG, "preprocessing": PREPROCESSING, "classes": CLASSES,
                             "activation": "softmax", "tags": {"corpus": "abc"}} | changes  # fmt: skip
    return publish(name, weights() if state is None else state, run_id=run_id, **parts)


def pictures(count: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (40 + 9 * n, 50, 3), np.uint8) for n in range(count)]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def logits_of(state: dict[str, torch.Tensor], images: list[np.ndarray]) -> torch.Tensor:
    model = VisionTransformer(CONFIG).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        return model(PREPROCESSING(images))


def as_matrix(answer: pd.DataFrame) -> np.ndarray:
    """Probabilities in the order of CLASSES."""
    rows = zip(answer["classes"], answer["probabilities"], strict=True)
    return np.array([[dict(zip(names, values, strict=True))[c] for c in CLASSES] for names, values in rows])


# ----------------------------------------------------------------------------------------------------------------
# Publishing and reading back
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_package_comes_back_as_it_was_published(registry: Registry, dtype: torch.dtype):
    state = {name: tensor.to(dtype) for name, tensor in weights().items()}
    version = put(f"round {dtype}".replace("torch.", ""), registry.new_run(), state, alias="champion")
    for uri in (version.uri, f"models:/{version.name}@champion", f"models:/{version.name}/latest"):
        package = load_package(uri)
        assert package.uri == version.uri == f"models:/{version.name}/1"
        assert package.state.keys() == state.keys()
        assert all(package.state[n].dtype == dtype and torch.equal(package.state[n], state[n]) for n in state)
        assert (package.config, package.preprocessing) == (CONFIG, PREPROCESSING)
        assert (package.classes, package.activation) == (CLASSES, "softmax")
        assert package.tags["corpus"] == "abc"
    told = mlflow.MlflowClient().get_model_version(version.name, version.version).description
    assert "runs the Python files inside this package" in told
    folder = mlflow.artifacts.download_artifacts(version.uri, dst_path=str(registry.folder / str(dtype)))
    assert torch.equal(load_package(folder).state["head.bias"], state["head.bias"])
    assert not list(Path(folder).rglob("*.pkl"))


def test_publishing_again_makes_no_second_version(registry: Registry, messages: Callable[[], str]):
    run = registry.new_run()
    first = put("idempotent", run, alias="champion")
    assert put("idempotent", run, alias="champion") == first
    other_weights = put("idempotent", run, weights(seed=1), alias="champion")
    other_run = put("idempotent", registry.new_run(), weights(seed=1), alias="champion")
    assert [v.version for v in (first, other_weights, other_run)] == ["1", "2", "3"]
    assert messages().splitlines()[-1] == "registered models:/idempotent/3 as @champion, which was version 2"
    assert put("idempotent", run, alias="champion") == first
    assert resolve("models:/idempotent@champion").version == "3", "a rerun must not take the alias back"
    already = "there is already models:/idempotent/1; @champion stays at version 3, which is newer"
    assert messages().splitlines()[-1] == already
    assert put("idempotent", run, alias="first") == first
    assert resolve("models:/idempotent@first").version == "1"
    models_logged = mlflow.search_logged_models([registry.experiment], output_format="list")
    assert sum(model.source_run_id == run for model in models_logged) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["a", "b"]}, "2 class names for a model with 3 outputs"),
        ({"preprocessing": Preprocessing(64)}, "preprocessing to 64 pixels for a model of 32"),
        ({"activation": "relu"}, "activation = 'relu'"),
        ({"config": replace(CONFIG, depth=3)}, r"another architecture: blocks\.2\.norm1\.weight is missing"),
        ({"state": weights() | {"norm.bias": torch.full((48,), torch.nan)}}, r"not finite: norm\.bias"),
        ({"name": "a/b"}, "registry.name = 'a/b' cannot be a model's name"),
        ({"name": ""}, "registry.name = '' cannot be a model's name"),
        ({"alias": "v2"}, "registry.alias = 'v2' cannot be an alias"),
        ({"run_id": "nowhere"}, "nowhere"),
    ],
)
def test_what_does_not_fit_together_is_not_published(registry: Registry, change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        put(**{"name": "refused", "run_id": registry.new_run()} | change)
    with pytest.raises(PackageError, match="no model is called 'refused'"):
        resolve("models:/refused@champion")


def test_unknown_models_aliases_and_versions_are_answered_with_what_there_is(registry: Registry):
    version = put("known", registry.new_run(), alias="champion")
    for uri, message in {
        "models:/unknown@champion": r"no model is called 'unknown' in the registry at sqlite:.*there are .*known",
        "models:/known@challenger": "model 'known' has no alias 'challenger': there are champion",
        "models:/known/7": "model 'known' has no version '7': there are 1; aliases: champion",
        "models:/known": "say which version: there are 1; aliases: champion",
        "models:/": "is no model",
        "/nowhere": "no model package at /nowhere",
        str(registry.folder): r"is no package of this project: it has no artifacts/model\.json",
    }.items():
        with pytest.raises(PackageError, match=message):
            load_package(uri)
    assert resolve("models:/known@champion") == version


def test_a_server_that_is_not_there_is_said_at_once(registry: Registry):
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    try:
        with pytest.raises(PackageError, match=r"MLflow server at http://127\.0\.0\.1:9 does not answer"):
            resolve("models:/known@champion")
    finally:
        mlflow.set_tracking_uri(registry.uri)


def stored(registry: Registry, name: str, seed: int) -> tuple[PublishedVersion, Path]:
    """A published version and its folder in the artifact store."""
    run = registry.new_run()
    version = put(name, run, weights(seed))
    (logged,) = [m for m in mlflow.search_logged_models([registry.experiment], output_format="list")
                 if m.source_run_id == run]  # fmt: skip
    return version, Path(logged.artifact_location.removeprefix("file://")) / "artifacts"


def test_altered_or_cut_packages_are_refused(registry: Registry):
    version, folder = stored(registry, "altered", seed=5)
    path = folder / "weights.safetensors"
    whole = path.read_bytes()
    save_safetensors(load_safetensors(path) | {"head.bias": torch.ones(3)}, path)
    with pytest.raises(PackageError, match="not the ones that were published"):
        load_package(version.uri)
    path.write_bytes(whole[:-4])
    with pytest.raises(PackageError, match="not the ones that were published"):
        load_package(version.uri)
    mlflow.MlflowClient().delete_model_version_tag(version.name, version.version, PACKAGE_TAG)
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        load_package(version.uri)
    path.write_bytes(whole)
    description = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(description | {"format_version": 99}))
    with pytest.raises(PackageError, match="package format 99, newer than the 1"):
        load_package(version.uri)
    with pytest.raises(MlflowException, match="package format 99 is newer"):
        mlflow.pyfunc.load_model(version.uri)


@pytest.mark.parametrize("change", ["code", "predictor.py", "MLmodel", "added", "removed", "link"])
def test_a_package_with_any_other_file_than_was_published_is_refused(
    registry: Registry, tmp_path: Path, change: str, messages: Callable[[], str]
):
    version, artifacts = stored(registry, f"changed {change}", seed=6)
    root = artifacts.parent
    assert load_package(version.uri).tags[PACKAGE_TAG] == package_digest(root)
    mlflow.pyfunc.load_model(version.uri).predict(pd.DataFrame({"image": pictures(1)}))
    assert load_package(version.uri), "what reading leaves in a local store is no change"
    marker = tmp_path / "run"
    evil = f"\nopen({str(marker)!r}, 'w').close()\n"
    if change in ("code", "predictor.py"):
        path = artifacts / "code" / "vit.py" if change == "code" else root / change
        path.write_text(path.read_text(encoding="utf-8") + evil, encoding="utf-8")
    elif change == "MLmodel":
        (root / change).write_bytes((root / change).read_bytes() + b"\n")
    elif change == "added":
        (artifacts / "code" / "torch.py").write_text(evil, encoding="utf-8")
    elif change == "removed":
        (root / "requirements.txt").unlink()
    else:
        (artifacts / "more").symlink_to("model.json")
    with pytest.raises(PackageError, match=r"vitforge\.package differs|no regular file"):
        load_package(version.uri)
    with pytest.raises(ClassifierError, match=r"not the package that was published|no regular file"):
        load_classifier(root, digest=version.tags[PACKAGE_TAG])
    assert not marker.exists()
    mlflow.MlflowClient().delete_model_version_tag(version.name, version.version, PACKAGE_TAG)
    if change != "link":
        assert load_package(version.uri), "as versions of before are"
        assert f"{version.uri} has no digest of all of its files" in messages()
        load_classifier(root)
    assert not marker.exists(), "neither runs the code of a package"


READER = """
import importlib.machinery, json, sys

class NotInstalled(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = {"mlflow", "ray", "safetensors", "pandas", "pydantic", "data_prep", "cluster", "pipeline"}
        missing = name.partition(".")[0] in absent
        return None if missing else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = NotInstalled
from models.classifier import load_classifier
images = [open(path, "rb").read() for path in sys.argv[3:]]
print(json.dumps(load_classifier(sys.argv[1], digest=sys.argv[2]).classify(images, top_k=3)))
"""


def test_our_own_code_answers_as_the_package_does_with_torch_and_pillow_alone(registry: Registry, tmp_path: Path):
    version, artifacts = stored(registry, "read", seed=7)
    files = []
    for number, image in enumerate(pictures()):
        files.append(tmp_path / f"{number}.png")
        files[-1].write_bytes(png(image))
    done = subprocess.run(
        [sys.executable, "-c", READER, str(artifacts.parent), version.tags[PACKAGE_TAG], *map(str, files)],
        cwd=REPOSITORY, timeout=300, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [dict(answer) for answer in json.loads(done.stdout)]
    expected = logits_of(weights(7), pictures()).softmax(dim=1)
    np.testing.assert_allclose([[answer[name] for name in CLASSES] for answer in answers], expected, atol=1e-5)


NAMES = ["a", "Ünï.c0de-", "a b", "a#b", "a*b", "a$b", "a&b;c=d", "a~b+c,(d)[e]{f}|^!", "n" * 256, "<a>"]
NO_NAMES = ["", " ", "a?b", "a%41b", "a@b", "a'b", 'a"b', "a`b", "a\\b", "a/b", "a:b", " a", "a\n", ".", "..",
            "n" * 257, "a\x1bb", "a\tb"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES + NO_NAMES)
def test_a_name_is_refused_in_the_beginning_or_works_to_the_end(registry: Registry, name: str):
    client = mlflow.MlflowClient()
    if name in NO_NAMES:
        with pytest.raises(SettingsError, match=re.escape(f"registry.name = {name!r} cannot be a model's name")):
            check_names("run", name, "champion")
        return
    check_names("run", name, "champion")
    client.create_registered_model(name)
    client.create_model_version(name, "file:///nowhere", registry.new_run())
    client.set_registered_model_alias(name, "champion", "1")
    assert resolve(f"models:/{name}@champion").uri == f"models:/{name}/1"
    for uri in (f"models:/{name}/1", f"models:/{name}@champion"):
        assert [str(part) for part in _get_model_name_and_version(client, uri)] == [name, resolve(uri).version]


def test_a_name_is_refused_before_seconds_of_imports():
    for setting in ("registry.alias=latest", "registry.alias=v2", "registry.name=it's", "registry.name=a/b"):
        code = (
            f"import sys; sys.argv = ['x', 'demo', 'data.corpus=/c', {setting!r}]; import pipeline.pretrain as stage\n"
        )
        code += "try: stage.main()\nexcept ValueError as error: print(error, {'mlflow', 'torch'} & set(sys.modules))"
        done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        assert re.fullmatch(r"registry\.\w+ = .* cannot be .* would do set\(\)\n", done.stdout), done.stdout


def test_what_mlflow_refuses_is_refused(monkeypatch: pytest.MonkeyPatch):
    for alias in ("latest", "LATEST", "v2", "V10", "a b", "a/b", "a@b", "a'b", "", "a" * 256, "champion\n", "é!"):
        with pytest.raises(SettingsError, match=r"registry\.alias = .* cannot be an alias"):
            check_names("run", "model", alias)
    for alias in ("champion", "a" * 255, "2x", "version2", "a-b_c"):
        check_names("run", "model", alias)
    with pytest.raises(SettingsError, match=r"run\.name has 251 characters"):
        check_names("r" * 251, None, None)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "e" * 501)
    with pytest.raises(SettingsError, match="cannot be an experiment's name"):
        check_names("run", None, None)


# ----------------------------------------------------------------------------------------------------------------
# Prediction
# ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(registry: Registry) -> Any:
    return mlflow.pyfunc.load_model(put("classifier", registry.new_run()).uri)


INPUTS: dict[str, Callable[[list[np.ndarray]], Any]] = {
    "DataFrame of bytes": lambda images: pd.DataFrame({"image": [png(image) for image in images]}),
    "DataFrame of arrays": lambda images: pd.DataFrame({"image": images}),
    "DataFrame of both": lambda images: pd.DataFrame({"image": [png(images[0]), *images[1:]]}),
    "DataFrame with more columns": lambda images: pd.DataFrame({"id": [1, 2, 3], "image": images}),
    "dict of lists": lambda images: {"image": [png(image) for image in images]},
    "list of dicts": lambda images: [{"image": png(image)} for image in images],
}


@pytest.mark.parametrize("kind", INPUTS)
def test_images_in_probabilities_out(classifier: Any, kind: str):
    images = pictures()
    answer = classifier.predict(INPUTS[kind](images))
    expected = logits_of(weights(), images).softmax(dim=1)
    np.testing.assert_allclose(as_matrix(answer), expected, atol=1e-5)
    assert [names[0] for names in answer["classes"]] == [CLASSES[i] for i in expected.argmax(dim=1)]
    assert all(values == sorted(values, reverse=True) for values in answer["probabilities"])


def test_a_batch_of_arrays_in_one(classifier: Any):
    batch = np.stack([image[:40] for image in pictures()])
    expected = logits_of(weights(), list(batch)).softmax(dim=1)
    np.testing.assert_allclose(as_matrix(classifier.predict({"image": batch})), expected, atol=1e-5)
    np.testing.assert_allclose(as_matrix(classifier.unwrap_python_model().classify(batch)), expected, atol=1e-5)


def test_one_image_is_one_image(classifier: Any):
    image = pictures(1)[0]
    expected = logits_of(weights(), [image]).softmax(dim=1)
    for one in (image, png(image), bytearray(png(image)), [image]):
        answer = classifier.unwrap_python_model().classify(one)
        np.testing.assert_allclose(as_matrix(answer), expected, atol=1e-5)
    with pytest.raises(MlflowException, match="looks like one row of an image"):
        classifier.predict({"image": image})
    with pytest.raises(MlflowException, match=r"one array of shape \[5, 4, 9\]"):
        classifier.unwrap_python_model().classify(np.zeros((5, 4, 9), np.uint8))


def test_many_images_and_the_index_of_the_frame(classifier: Any):
    images = pictures(3) * 50  # more than go through the model at once
    frame = pd.DataFrame({"image": images}, index=range(1000, 1150))
    answer = classifier.predict(frame, params={"top_k": 1})
    assert list(answer.index) == list(frame.index)
    best = logits_of(weights(), images).argmax(dim=1)
    assert list(answer["classes"]) == [[CLASSES[i]] for i in best]


def test_sigmoid_models_give_each_class_its_own_probability(registry: Registry):
    model = mlflow.pyfunc.load_model(put("sigmoid", registry.new_run(), activation="sigmoid").uri)
    expected = logits_of(weights(), pictures()).sigmoid()
    np.testing.assert_allclose(as_matrix(model.predict({"image": pictures()})), expected, atol=1e-5)


def test_the_signature_says_what_goes_in_and_out(classifier: Any):
    signature = classifier.metadata.signature
    assert signature.inputs.to_dict() == [{"type": "any", "name": "image", "required": False}]
    assert signature.outputs.input_names() == ["classes", "probabilities"]
    assert [(param.name, param.default) for param in signature.params] == [("top_k", 3)]


@pytest.mark.parametrize(
    ("image", "params", "message"),
    [
        (b"no image", {}, "image 1 of 2: 8 bytes that are no image"),
        (np.zeros((4, 4, 3)), {}, "image 1 of 2: an array of float64"),
        (None, {}, "image 1 of 2: bytes .* are wanted, not NoneType"),
        (png(pictures(1)[0]), {"top_k": 4}, "top_k = 4: the model has 3 classes"),
        (png(pictures(1)[0]), {"top_k": 0}, "top_k = 0: the model has 3 classes"),
    ],
)
def test_bad_requests_are_answered_with_the_reason(classifier: Any, image: Any, params: dict[str, Any], message: str):
    with pytest.raises(MlflowException, match=message):
        classifier.predict(pd.DataFrame({"image": [png(pictures(1)[0]), image]}), params=params)


@pytest.mark.parametrize("breaks", [False, True], ids=["", "with line breaks"])
@pytest.mark.parametrize("form", ["dataframe_split", "dataframe_records", "inputs", "instances"])
def test_the_scoring_server_takes_base64(classifier: Any, form: str, breaks: bool):
    images = pictures()
    encode = base64.encodebytes if breaks else base64.b64encode
    texts = [encode(png(image)).decode().replace("\n", "\r\n" * breaks) for image in images]
    body = {
        "dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]},
        "dataframe_records": [{"image": text} for text in texts],
        "inputs": {"image": texts},
        "instances": [{"image": text} for text in texts],
    }[form]
    request = {form: body, "params": {"top_k": 2}}
    response = scoring_server.invocations(
        json.dumps(request), "application/json", classifier, classifier.metadata.get_input_schema()
    )
    assert response.status == 200
    answers = json.loads(response.response)["predictions"]
    expected = logits_of(weights(), images).softmax(dim=1).topk(2, dim=1)
    np.testing.assert_allclose([answer["probabilities"] for answer in answers], expected.values, atol=1e-5)
    assert [answer["classes"] for answer in answers] == [[CLASSES[i] for i in row] for row in expected.indices.tolist()]


# ----------------------------------------------------------------------------------------------------------------
# A consumer: a program of its own, with modules of our names and without our packages
# ----------------------------------------------------------------------------------------------------------------

CONSUMER = """
import importlib.machinery, json, sys

class NotInstalled(importlib.machinery.PathFinder):
    names = {"ray", "deepspeed", "nvidia", "webdataset", "s3fs", "safetensors", "pyarrow", "transformers", "scipy",
             "sklearn", "simplejpeg", "xxhash", "matplotlib", "torchvision", "data_prep", "cluster"}
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in cls.names else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = NotInstalled
import models, pipeline.steps
import mlflow, numpy as np, pandas as pd

images = list(np.load("images.npz").values())
predictors = [mlflow.pyfunc.load_model(uri) for uri in sys.argv[1:]]
answers = [p.predict(pd.DataFrame({"image": images})).to_dict("list") for p in predictors + predictors[:1]]
import models.prices, pipeline
assert models.prices.PRICE == 7 and pipeline.steps.STEP == "mine" and pipeline.__file__.startswith(sys.path[0])
assert not NotInstalled.names & {name.partition(".")[0] for name in sys.modules}
print(json.dumps(answers))
"""


def test_a_consumer_with_modules_of_our_names_loads_two_versions_of_the_code(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ours = put("consumed", registry.new_run())
    changed = tmp_path / "vit.py"
    source = Path(models.vit.__file__).read_text()
    assert source.count("return self.head(features)") == 1
    changed.write_text(source.replace("return self.head(features)", "return -2 * self.head(features)"))
    with monkeypatch.context() as patch:
        patch.setattr(models.vit, "__file__", str(changed))
        theirs = put("consumed", registry.new_run())
    assert (ours.version, theirs.version) == ("1", "2")

    project = tmp_path / "consumer"
    for path, text in {
        "consume.py": CONSUMER,
        "models/__init__.py": "",
        "models/prices.py": "PRICE = 7",
        "pipeline/__init__.py": "",
        "pipeline/steps.py": "STEP = 'mine'",
    }.items():
        (project / path).parent.mkdir(parents=True, exist_ok=True)
        (project / path).write_text(textwrap.dedent(text))
    np.savez(project / "images.npz", *pictures())
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MLFLOW"))} | {
        "MLFLOW_TRACKING_URI": registry.uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        # As on Windows: text files are not UTF-8 unless it is said.
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    done = subprocess.run(
        [sys.executable, "consume.py", ours.uri, theirs.uri],
        cwd=project, env=environment, timeout=300, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [as_matrix(pd.DataFrame(answer)) for answer in json.loads(done.stdout.splitlines()[-1])]
    logits = logits_of(weights(), pictures())
    np.testing.assert_allclose(answers[0], logits.softmax(dim=1), atol=1e-5)
    np.testing.assert_allclose(answers[1], (-2 * logits).softmax(dim=1), atol=1e-5)
    np.testing.assert_array_equal(answers[2], answers[0])  # the first again, after the second was loaded and used


# ----------------------------------------------------------------------------------------------------------------
# What is left over, and where there is no room
# ----------------------------------------------------------------------------------------------------------------

KILLED = """
import os, sys
import mlflow
from cluster import ownership
from pipeline import orphans
from tests.test_packages import put, weights
uri, run, moment = sys.argv[1:]
mlflow.set_tracking_uri(uri)
real = mlflow.MlflowClient.log_model_artifacts
def killed(*arguments):
    if moment == "in the store":
        real(*arguments)
    os.kill(os.getpid(), 9)
if moment == "registered":
    orphans.keep = killed
else:
    mlflow.MlflowClient.log_model_artifacts = killed
put("killed", run, weights())
"""


@pytest.mark.parametrize("moment", ["on its way", "in the store", "registered"])
def test_what_a_killed_publisher_left_is_removed_by_the_next(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
):
    run, other = registry.new_run(), registry.new_run()
    place = registry.folder / "artifacts" / "models"
    with tempfile.TemporaryDirectory() as temporary:
        theirs = mlflow.initialize_logged_model("theirs", source_run_id=run, experiment_id=registry.experiment)
        before = {*place.iterdir()} if place.exists() else set()
        done = subprocess.run(
            [sys.executable, "-c", KILLED, registry.uri, run, moment],
            cwd=REPOSITORY, env=environment(tmp_path, TMPDIR=temporary), check=False,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL
        left = list(Path(temporary).rglob("weights.safetensors"))
        assert left, "the package itself, and what MLflow copied of it"
        monkeypatch.setattr(tempfile, "tempdir", temporary)
        put("another", other)
        assert not any(path.exists() for path in left)
        places = list({*place.iterdir()} - before)  # what a dead process left is removed by any run, its version is not
        assert sum(bool(list(path.rglob("weights.safetensors"))) for path in places) == 1 + (moment == "registered")
        published = put("killed", run)
        assert put("killed", run) == published
    client = mlflow.MlflowClient()
    assert client.get_logged_model(theirs.model_id).status == "PENDING"
    models_of_run = client.search_logged_models([registry.experiment], f"source_run_id = '{run}'")
    assert all("vitforge.owner" not in model.tags for model in models_of_run)
    assert published.version == str(len(mlflow.MlflowClient().search_model_versions("name = 'killed'")))
    weights_of = [path for path in {*place.iterdir()} - before if list(path.rglob("weights.safetensors"))]
    assert len(weights_of) == 2  # that of the other run, and one of this
    assert torch.equal(load_package(published.uri).state["head.bias"], weights()["head.bias"])


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_temporary_folder_is_named_and_another_scratch_does(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    small, size = tmp_path / "small", 4 * sum(tensor.numel() for tensor in weights().values())
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", str(small)]).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(small))
        run = registry.new_run()

        def hand_over(scratch: str) -> PublishedVersion:
            with room_for_hand_over(scratch, size, registry.folder), temporary_files(scratch, "hand-over"):
                return put("full", run)

        with pytest.raises(SettingsError, match=r"no space is left to hand the model over; .* set checkpoint\.scratch"):
            hand_over("")
        with pytest.raises(SettingsError, match=rf"no room for the model's package: .* {small}, .* checkpoint.scratch"):
            check_package_room("", size, registry.folder)
        assert list((small / f"vitforge-{os.geteuid()}").iterdir()) == []
        (small / "full").write_bytes(b"0" * (shutil.disk_usage(small).free))
        check_package_room(str(tmp_path / "scratch"), size, registry.folder)
        version = hand_over(str(tmp_path / "scratch"))
        with pytest.raises(SettingsError, match=rf"{version.uri} cannot be read: no space is left in {small}"):
            load_package(version.uri)
        with temporary_files(str(tmp_path / "scratch"), "parent"):
            assert load_package(version.uri).config == CONFIG
        assert list((tmp_path / "scratch").iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 1_000_000}, "depth = 1000000: at most"),
        ({"depth": 1000}, "tensors, too few for 1000 blocks"),
        ({"width": 2**60}, "width = 1152921504606846976: at most"),
        ({"width": float("nan")}, "width = nan must be a whole number"),
        ({"unknown": 1}, "unknown architecture"),
    ],
)
def test_a_description_of_a_model_that_cannot_be_is_refused_before_it_is_built(tmp_path, change, message):
    folder = shutil.copytree(Path(__file__).parent / "frozen" / "package", tmp_path / "package")
    path = folder / "artifacts" / "model.json"
    description = json.loads(path.read_text())
    description["architecture"].update(change)
    path.write_text(json.dumps(description))
    with pytest.raises(PackageError, match=re.escape(message)):
        load_package(str(folder))


def test_weights_that_are_no_file_or_lie_over_each_other_are_refused(tmp_path: Path):
    package = tmp_path / "package"
    shutil.copytree(REPOSITORY / "tests" / "frozen" / "package", package)
    assert load_classifier(package).classes
    weights = package / "artifacts" / "weights.safetensors"
    entry = {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}
    header = json.dumps({f"tensor{number}": entry for number in range(100)}).encode()
    weights.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4000))
    with pytest.raises(ClassifierError, match="tensor1 lies where another tensor does"):
        load_classifier(package)
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(ClassifierError, match="no complete safetensors file"):
        load_classifier(package)


@pytest.mark.parametrize(("scheme", "reason"), [("postgresql+pg8000", "needs pg8000"), ("bad+x", "unsupported URI")])
def test_a_registry_that_cannot_be_reached_from_here_is_one_message(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, scheme: str, reason: str
):
    uri = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_MAX_RETRIES", "1")
    mlflow.set_tracking_uri(f"{scheme}://me:hush@127.0.0.1:9/x")
    try:
        with pytest.raises(PackageError, match=reason) as caught:
            resolve("models:/pets/1")
    finally:
        mlflow.set_tracking_uri(uri)
    assert "hush" not in str(caught.value)
