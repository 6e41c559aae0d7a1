"""What a run's folder and MLflow say of its settings and its parent, once it is started again with others.

The commands are called as they are, up to where the ranks would start: as killed before their first checkpoint. What
has a checkpoint is a run of tests/frozen.
"""

import json
import shutil
import sys

import mlflow
import pytest

from cluster.settings import SettingsError
from pipeline import finetune, packages, pretrain, stage, tracking
from tests.corpora import image_folder, make_corpus
from tests.test_frozen import FROZEN
from tests.test_stages import publish


class Killed(BaseException):
    """The command is killed now, before the ranks start."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("records")
    return make_corpus(image_folder(root / "images", classes=3, images=8), root / "corpus")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("VITFORGE_HOME", str(tmp_path / "home"))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)

    def killed(*arguments, **options):
        (tmp_path / "home" / "runs" / "r" / "metrics.jsonl").touch()  # it had set out
        raise Killed

    monkeypatch.setattr(stage, "run_ranks", killed)
    return tmp_path / "home"


def start(monkeypatch, module, *words):
    monkeypatch.setattr(sys, "argv", [module.__name__, *words])
    with pytest.raises(Killed):
        module.main()


def tracked(home):
    record = json.loads((home / "runs" / "r" / "run.json").read_text())
    return mlflow.MlflowClient().get_run(record["mlflow_run"])


def settings_of(home):
    return json.loads((home / "runs" / "r" / "settings.json").read_text())


def earlier(home):
    return {path.name: json.loads(path.read_text()) for path in (home / "runs" / "r").glob("earlier-settings/*")}


def test_other_settings_before_the_first_checkpoint_are_those_of_the_record(home, corpus, monkeypatch):
    words = ["demo", f"data.corpus={corpus.path}", "run.name=r", "registry.name=null", "training.global_batch=12",
             "training.duration=100 steps", "run.workers=null"]  # fmt: skip
    start(monkeypatch, pretrain, *words)
    first = tracked(home)
    assert first.data.params["optimizer.learning_rate"] == "0.002"
    start(monkeypatch, pretrain, *words)
    assert tracked(home).info.run_id == first.info.run_id
    assert earlier(home) == {}

    start(monkeypatch, pretrain, *words, "optimizer.learning_rate=0.01", "model.width=64")
    second = tracked(home)
    assert settings_of(home)["optimizer"]["learning_rate"] == 0.01
    assert (second.data.params["optimizer.learning_rate"], second.data.params["model.mlp_dim"]) == ("0.01", "128")
    assert second.data.tags["vitforge.instead_of"] == first.info.run_id
    replaced = mlflow.MlflowClient().get_run(first.info.run_id)
    assert (replaced.info.status, replaced.data.tags["vitforge.begun_again_as"]) == ("KILLED", second.info.run_id)
    (held,) = earlier(home).items()
    assert (held[0], held[1]["optimizer"]["learning_rate"]) == ("until-step-00000000.json", 0.002)

    # What does not change what is computed leaves the tracking run as it is, with a tag.
    start(monkeypatch, pretrain, *words, "optimizer.learning_rate=0.01", "model.width=64", "log.every=7")
    third = tracked(home)
    assert third.info.run_id == second.info.run_id
    assert third.data.tags["vitforge.changed.log.every"] == "50, from step 0 on 7"
    assert "log.every=7" in third.data.tags["vitforge.command"]
    assert settings_of(home)["log"]["every"] == 7
    assert sorted(earlier(home)) == ["until-step-00000000-2.json", "until-step-00000000.json"]


def test_changes_of_a_run_with_a_checkpoint_are_told_with_their_step(home, monkeypatch, tmp_path):
    place = tmp_path / "frozen"
    shutil.copytree(FROZEN, place)
    run = shutil.copytree(place / "runs" / "softmax", home / "runs" / "r")
    words = words_of(run, place)
    words += ["run.name=r", "log.every=1"]
    start(monkeypatch, pretrain, *words)  # by this version for the first time: what it lacks means what it did
    assert settings_of(home)["data"]["rules"] == 1
    began = tracked(home)
    start(monkeypatch, pretrain, *words, "optimizer.learning_rate=0.01", "run.allow_changes=true")
    start(monkeypatch, pretrain, *words, "optimizer.learning_rate=0.02", "run.allow_changes=true")
    assert tracked(home).info.run_id == began.info.run_id
    rate = began.data.params["optimizer.learning_rate"]
    tags = tracked(home).data.tags
    assert tags["vitforge.changed.optimizer.learning_rate"] == f"{rate}, from step 10 on 0.01, from step 10 on 0.02"
    assert settings_of(home)["optimizer"]["learning_rate"] == 0.02
    rates = {name: values["optimizer"]["learning_rate"] for name, values in earlier(home).items()}
    assert rates["until-step-00000010-2.json"] in (0.01, float(rate))
    assert {float(rate), 0.01} <= set(rates.values())
    files = {info.path for info in mlflow.MlflowClient().list_artifacts(began.info.run_id, "earlier-settings")}
    assert "earlier-settings/until-step-00000010-2.json" in files
    # As the recipe, without a word, it is what the run goes on with.
    start(monkeypatch, pretrain, str(run / "settings.json"))
    assert settings_of(home)["optimizer"]["learning_rate"] == 0.02


def words_of(run, place):
    """The command of a run of tests/frozen; its file does not belong in a run's folder."""
    words = json.loads((run / "expected.json").read_text())["words"][1:]
    (run / "expected.json").unlink()
    return [word.replace("FROZEN", str(place)) for word in words]


TUNE = ["demo", "run.name=r", "registry.name=null", "registry.alias=null", "training.global_batch=12",
        "training.duration=100 steps", "run.workers=null", "data.image_size=16"]  # fmt: skip


def initial(home):
    return (home / "runs" / "r" / "initial.safetensors").read_bytes()


def test_another_parent_is_that_of_a_run_without_a_checkpoint(home, corpus, monkeypatch, caplog):
    publish(home)
    publish(home, image_size=24)  # other weights of the same model
    alias = [*TUNE, f"data.corpus={corpus.path}", "parent=models:/small@champion"]
    client = mlflow.MlflowClient()
    client.set_registered_model_alias("small", "champion", "1")
    start(monkeypatch, finetune, *alias)
    began = tracked(home)
    first = initial(home)

    client.set_registered_model_alias("small", "champion", "2")  # which is not another parent
    start(monkeypatch, finetune, *alias)
    start(monkeypatch, finetune, *alias, "parent=models:/small/1")
    record = json.loads((home / "runs" / "r" / "run.json").read_text())
    assert (record["parent"], settings_of(home)["parent"]) == ("models:/small/1", "models:/small@champion")
    assert tracked(home).info.run_id == began.info.run_id
    assert initial(home) == first

    for wrong in ("models:/smal@champion", "models:/small/7", "models:/small@best", "/nowhere"):
        monkeypatch.setattr(sys, "argv", ["finetune", *alias, f"parent={wrong}"])
        with pytest.raises(packages.PackageError):
            finetune.main()
    assert json.loads((home / "runs" / "r" / "run.json").read_text()) == record

    start(monkeypatch, finetune, *alias, "parent=models:/small/2")
    record = json.loads((home / "runs" / "r" / "run.json").read_text())
    assert (record["parent"], settings_of(home)["parent"]) == ("models:/small/2", "models:/small/2")
    assert tracked(home).data.params["parent"] == "models:/small/2"
    assert tracked(home).data.tags["vitforge.parent"] == "models:/small/2"
    assert initial(home) != first

    # So is another resolution, whose position embedding is another.
    start(monkeypatch, finetune, *alias, "parent=models:/small/2", "data.image_size=24")
    record = json.loads((home / "runs" / "r" / "run.json").read_text())
    assert record["architecture"]["image_size"] == 24
    assert len(initial(home)) > len(first)


def test_another_parent_of_a_run_with_a_checkpoint_is_refused(home, monkeypatch, tmp_path):
    tracking.connect(home)
    publish(home)
    place = tmp_path / "frozen"
    shutil.copytree(FROZEN, place)
    run = shutil.copytree(place / "runs" / "finetune", home / "runs" / "r")
    words = words_of(run, place)
    monkeypatch.setattr(
        sys, "argv", ["finetune", *words, "run.name=r", "parent=models:/small/1", "run.allow_changes=true"]
    )
    with pytest.raises(SettingsError, match=r"fine-tuning of models:/frozen/1, and has a checkpoint.*models:/small/1"):
        finetune.main()
    start(monkeypatch, finetune, *words, "run.name=r", "log.every=1")  # whose parent no registry has any more
