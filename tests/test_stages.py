"""The stages' commands with input that cannot work: one clear message, status 2, nothing half-written."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import mlflow
import pytest
import torch

from cluster.folders import LocalFolder
from cluster.lease import Lease
from models.preprocess import Preprocessing
from models.presets import vit_config
from models.vit import VisionTransformer
from pipeline import evaluate, finetune, packages, pretrain, tracking
from tests.corpora import image_folder, make_corpus
from tests.running import REPOSITORY, environment, losses, script, torchrun


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("stages")
    return make_corpus(image_folder(root / "images", classes=3, images=8), root / "corpus")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("VITFORGE_HOME", str(tmp_path / "home"))
    for name in ("MLFLOW_TRACKING_URI", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


def error_of(stage, monkeypatch, *words):
    length = ["training.duration=100 steps"] if stage is not evaluate else []
    monkeypatch.setattr(sys, "argv", [stage.__name__, *words[:1], *length, *words[1:]])
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the message is what the tests are about
        stage.main()
    return str(caught.value)


def written(home):
    runs = home / "runs"
    return sorted(path.name for path in runs.iterdir()) if runs.exists() else []


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["training.global_batch=63", "data.augment.mixup=0.0"],
            ["training.global_batch = 63", "2 ranks", "run.workers = 1, 3, 7, 9, 21 or 63"],
        ),
        (["training.micro_batch=5"], ["training.micro_batch = 5", "32 images", "4, 8"]),
        (["data.image_size=18"], ["data.image_size = 18", "patch_size = 4", "16 or 20"]),
        (["model.name=XL/16"], ["model.name = 'XL/16'", "Ti, S, B"]),
        (["data.eval_resize=256"], ["data.eval_resize = 256 is 16 times data.image_size = 16", "0.39 %"]),
        (["model.heads=5"], ["heads = 5", "width = 128"]),
        (["optimizer.warmup=101 steps"], ["optimizer.warmup", "do not fit"]),
        (["data.corpus=/nowhere"], ["/nowhere", "no such folder"]),
    ],
)
def test_pretraining_refuses_before_anything_starts(home, corpus, monkeypatch, overrides, parts):
    message = error_of(pretrain, monkeypatch, "demo", f"data.corpus={corpus.path}", *overrides)
    for part in parts:
        assert part in message
    assert written(home) == []


def test_the_command_leaves_with_status_two_and_one_message(home, corpus):
    done = subprocess.run(
        [sys.executable, "pipeline/pretrain.py", "demo", f"data.corpus={corpus.path}", "training.global_bach=1"],
        cwd=REPOSITORY, env=environment(home), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown key 'training.global_bach'")
    assert "Traceback" not in done.stderr
    assert not home.exists()


@pytest.mark.parametrize("damage", ["manifest", "index", "shard", "missing"])
def test_a_damaged_corpus_is_refused_by_file(home, tmp_path, monkeypatch, damage):
    corpus = make_corpus(image_folder(tmp_path / "images"), tmp_path / "corpus")
    shard = sorted(corpus.path.glob("*.tar"))[-1]
    file = {"manifest": corpus.path / "manifest.json", "index": corpus.path / "index.bin"}.get(damage, shard)
    if damage == "missing":
        file.unlink()
    elif damage == "manifest":
        file.write_text(file.read_text().replace('"c0"', '"c9"'))
    else:
        file.write_bytes(file.read_bytes()[:-200])
    message = error_of(pretrain, monkeypatch, "demo", f"data.corpus={corpus.path}")
    assert file.name in message
    assert written(home) == []


def test_held_out_images_of_other_classes_are_refused(home, corpus, tmp_path, monkeypatch):
    other = make_corpus(image_folder(tmp_path / "images", classes=4), tmp_path / "other")
    message = error_of(pretrain, monkeypatch, "demo", f"data.corpus={corpus.path}", f"data.heldout={other.path}")
    assert "other classes" in message
    assert "4: c0, c1, c2, c3" in message


def publish(home, classes=("c0", "c1", "c2"), image_size=16):
    tracking.connect(home)
    config = dataclasses.replace(vit_config("Ti/4", image_size=image_size, num_classes=len(classes)), depth=1)
    torch.manual_seed(0)
    run = tracking.Run("made", None)
    state = VisionTransformer(config).state_dict()
    version = packages.publish(
        "small", state, config, Preprocessing(image_size), list(classes), "softmax",
        tags={}, run_id=run.run_id, alias="champion",
    )  # fmt: skip
    run.finish()
    return version


def test_finetuning_names_what_the_registry_has(home, corpus, monkeypatch):
    publish(home)
    for parent, part in (
        ("models:/smal@champion", "no model is called 'smal'"),
        ("models:/small@winner", "no alias 'winner': there are champion"),
        ("models:/small/7", "no version '7': there are 1"),
        ("/nowhere", "no model package at /nowhere"),
    ):
        message = error_of(finetune, monkeypatch, "demo", f"parent={parent}", f"data.corpus={corpus.path}")
        assert part in message
    message = error_of(
        finetune,
        monkeypatch,
        "demo",
        "parent=models:/small@champion",
        f"data.corpus={corpus.path}",
        "data.image_size=17",
    )
    assert "data.image_size = 17" in message
    assert "16 or 20" in message
    assert written(home) == []


def test_evaluation_refuses_a_corpus_of_other_classes(home, corpus, monkeypatch):
    publish(home, classes=("x", "y"))
    message = error_of(evaluate, monkeypatch, "models:/small@champion", str(corpus.path))
    assert "knows 2 classes (x, y" in message
    assert "has 3 (c0, c1, c2" in message


def test_evaluation_takes_the_interface_that_is_named(home, corpus):
    publish(home)
    done = torchrun(1, home, "pipeline/evaluate.py", "models:/small@champion", str(corpus.path), "interface=nope0")
    assert done.returncode != 0
    assert "\nerror: interface = 'nope0': " in done.stderr
    assert "has no such network interface; it has " in done.stderr


def test_a_run_folder_in_use_or_of_another_stage_is_refused(home, corpus, monkeypatch):
    folder = home / "runs" / "demo-pretrain"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("")
    with Lease(LocalFolder(folder)):
        assert "another job works in" in error_of(pretrain, monkeypatch, "demo", f"data.corpus={corpus.path}")
    (folder / "run.json").write_text(json.dumps({"stage": "finetune", "parent": "models:/a/1"}))
    message = error_of(pretrain, monkeypatch, "demo", f"data.corpus={corpus.path}")
    assert "holds a finetune run from models:/a/1" in message


def test_checkpoints_of_which_none_is_whole_are_not_passed_over_in_silence(home, corpus, monkeypatch):
    checkpoints = home / "runs" / "demo-pretrain" / "checkpoints"
    folder = checkpoints / "step-00000010-0123abcd-0000"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"step": 10')
    message = error_of(pretrain, monkeypatch, "demo", f"data.corpus={corpus.path}")
    assert "none of the 1 checkpoint(s)" in message
    assert "use another run.name" in message
    (folder / "manifest.json").write_text('{"step": 10, "parts": [], "format": 99}')
    assert "has format 99" in error_of(pretrain, monkeypatch, "demo", f"data.corpus={corpus.path}")
    assert folder.exists()
    (checkpoints / "step-00000010").mkdir()
    (checkpoints / "step-00000010" / "state.json").write_text("{}")
    assert "has format 1," in error_of(pretrain, monkeypatch, "demo", f"data.corpus={corpus.path}")


def test_a_server_that_does_not_answer_is_named(home, corpus, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    message = error_of(pretrain, monkeypatch, "demo", f"data.corpus={corpus.path}")
    assert "http://127.0.0.1:9" in message
    assert written(home) == []
    mlflow.set_tracking_uri(None)


def test_classes_without_images_are_said_and_allowed(home, tmp_path, monkeypatch, caplog):
    import logging

    from data_prep.mixture import Mixture
    from pipeline.config import PretrainSettings
    from pipeline.stage import check_stage
    from tests.test_settings import demo

    folder = image_folder(tmp_path / "images", classes=3)
    (folder / "c1x").mkdir()
    corpus = make_corpus(folder, tmp_path / "corpus")
    assert corpus.class_counts == [10, 10, 0, 10]
    monkeypatch.setattr(logging.getLogger("vitforge"), "propagate", True)
    settings = demo("training.duration=100 steps")
    assert isinstance(settings, PretrainSettings)
    check_stage(settings, Mixture.of(corpus))
    assert "1 of the 4 classes" in caplog.text
    assert "c1x" in caplog.text


def test_under_torchrun_an_error_names_the_node_that_it_is_on(tmp_path):
    done = script(
        tmp_path, "pipeline/pretrain.py", "demo", "data.corpus=/nowhere", "run.name=x", "training.duration=1 steps",
        TORCHELASTIC_RUN_ID="x", RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_ADDR="a",
        MASTER_PORT="1",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert f"error on {os.uname().nodename} (rank 3): " in done.stderr
    assert "/nowhere" in done.stderr


@pytest.mark.parametrize("name", ["settings.json", "notes/a.txt"])
def test_a_folder_of_a_user_is_not_taken_for_a_run_s(home, corpus, monkeypatch, name):
    path = home / "runs" / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    message = error_of(pretrain, monkeypatch, "demo", f"data.corpus={corpus.path}", "run.name=mine")
    assert f"holds '{name.partition('/')[0]}' and is no run's folder: use another run.name" in message
    assert [each for each in path.parent.rglob("*") if each.is_file()] == [path]
    assert path.read_text() == "mine"


def test_a_refused_run_leaves_what_a_user_has_put_into_its_folder(home, corpus, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    folder = home / "runs" / "mine"
    real = tracking.connect

    def connect(*arguments):
        if folder.exists():
            (folder / "notes.txt").write_text("mine")
        return real(*arguments)

    monkeypatch.setattr(tracking, "connect", connect)
    error_of(pretrain, monkeypatch, "demo", f"data.corpus={corpus.path}", "run.name=mine", "run.workers=1")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


TUNE = [
    "pipeline/finetune.py", "demo", "parent=models:/small@champion", "data.image_size=24", "training.global_batch=12",
    "optimizer.warmup=null", "training.duration=2 steps", "log.every=1", "run.workers=null", "run.name=tune",
    "registry.name=tuned", "registry.alias=champion",
]  # fmt: skip


@pytest.mark.slow
def test_a_fine_tuning_needs_its_parent_once_and_moves_an_alias_once(home, corpus):
    """It is stopped before its first checkpoint, the parent is deleted, a newer version takes the alias."""
    publish(home)
    command = [*TUNE, f"data.corpus={corpus.path}"]
    done = torchrun(1, home, *command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "registered models:/tuned/1 as @champion" in done.stderr
    run = home / "runs" / "tune"
    before = losses(run / "metrics.jsonl")
    shutil.rmtree(run / "checkpoints")
    client = mlflow.MlflowClient()
    client.delete_registered_model("small")
    source = client.get_model_version("tuned", "1").source
    client.create_model_version("tuned", source)
    client.set_registered_model_alias("tuned", "champion", "2")
    done = torchrun(1, home, *command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "this run began with models:/small/1 and goes on with it" in done.stderr
    assert losses(run / "metrics.jsonl") == before
    assert "there is already models:/tuned/1; @champion stays at version 2, which is newer" in done.stderr
    assert "as @champion" not in done.stderr
