"""Settings that nobody can mean, each given to the stages' commands: one message that names the setting, or accepted.

The commands are called as they are, up to where the ranks would start.
"""

import re
import sys
from pathlib import Path

import pytest

from cluster.settings import iterate_keys
from models.vit import VitConfig
from pipeline import demo, evaluate, finetune, pretrain, stage
from pipeline.config import FinetuneSettings, PretrainSettings
from pipeline.proportions import check_model_size
from tests.corpora import image_folder, make_corpus

PACKAGE = Path(__file__).parent / "frozen" / "package"
NUMBERS = ("1000000000", "9000000000000000000", "0", "-1", "1e308", ".nan", "1.5")


class Started(Exception):  # noqa: N818 - it is none
    """The command would start the ranks now."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("wrong")
    return make_corpus(image_folder(root / "images", classes=3, images=8), root / "corpus")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("VITFORGE_HOME", str(tmp_path / "home"))
    for name in ("MLFLOW_TRACKING_URI", "RANK", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


def outcome(monkeypatch, module, corpus, *words):
    """Of a command: "accepted", or what it says."""
    parent = [f"parent={PACKAGE}"] if module is finetune else []
    length = ["training.duration=100 steps", "training.global_batch=12", "run.workers=null", "registry.name=null"]
    alias = ["registry.alias=null"] if module is finetune else []
    monkeypatch.setattr(
        sys, "argv", [module.__name__, "demo", *parent, f"data.corpus={corpus.path}", *length, *alias, *words]
    )
    try:
        module.main()
    except Started:
        return "accepted"
    except ValueError as error:
        return str(error)
    raise AssertionError("the command came to its end")


def started(*arguments, **options):
    raise Started


@pytest.mark.parametrize("module", [pretrain, finetune], ids=["pretrain", "finetune"])
def test_any_number_in_any_setting_is_taken_or_refused_by_name(home, corpus, monkeypatch, module):
    monkeypatch.setattr(stage, "run_stage", started)
    kind = PretrainSettings if module is pretrain else FinetuneSettings
    keys = [
        (key, "tuple" in str(field.annotation) or "Triple" in str(field.annotation))
        for key, field in iterate_keys(kind)
        if re.search(r"int|float", str(field.annotation))
    ]
    assert len(keys) > 40
    for key, several in keys:
        for number in NUMBERS:
            length = 3 if key in ("data.mean", "data.std") else 2
            value = f"[{', '.join([number] * length)}]" if several else number
            said = outcome(monkeypatch, module, corpus, f"{key}={value}")
            if number in ("1e308", ".nan"):
                assert said != "accepted", f"{key}={value}"
            assert said == "accepted" or key.split(".")[-1] in said, f"{key}={value}: {said}"
            assert "function-" not in said
            assert "constrained" not in said


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("run.name={long}", ["run.name has 400 characters", "250"]),
        ("run.name=a b", ["run.name: 'a b'", "such as a-b"]),
        ("run.name=runs/a", ["run.name: 'runs/a'", "such as runs-a"]),
        ("run.name=..", ["run.name: '..'", "letter or digit first"]),
        ("run.name=äöü", ["run.name: 'äöü'"]),
        ("run.name=true", ["run.name = true on the command line", "run.name=\"'true'\""]),
        ("run.home=/dev/null/x", ["run.home = '/dev/null/x': /dev/null is a file", "set run.home to a folder"]),
        ("run.home={file}", ["is a file, and no folder"]),
        ("run.home=/tmp/{long}", ["run.home", "at most 255 bytes (here 400)"]),
        ("run.home=/{deep}", ["run.home", "fewer than 4,096"]),
        ("run.home=~nobody-of-that-name/x", ["run.home", "no user 'nobody-of-that-name'"]),
        ("run.home=file:///tmp/x", ["run.home = 'file:///tmp/x'"]),
        ("checkpoint.scratch=/dev/null/x", ["checkpoint.scratch = '/dev/null/x': /dev/null is a file"]),
        ("checkpoint.scratch=s3://bucket/x", ["checkpoint.scratch = 's3://bucket/x'"]),
        ("data.corpus={file}", ["no corpus at", "that is a file"]),
        ("data.corpus=/tmp/{long}", ["data.corpus", "at most 255 bytes"]),
        ("data.heldout=~nobody-of-that-name/x", ["data.heldout", "no user"]),
        ("training.duration=5", ["training.duration: 5 of what?", '"5 epochs"']),
        ("training.duration=0", ["training.duration = 0"]),
        ("optimizer.warmup=0.5", ["optimizer.warmup: 0.5 of what?"]),
        ("run.stop_after=5", ["run.stop_after: 5 of what?", '"5 h"']),
        ("run.stop_after={nines} d", ["run.stop_after", "is not a time"]),
        ("run.workers=0", ["run.workers = 0 on the command line: input should be greater than 0"]),
        ("run.workers=1.5", ["run.workers = 1.5", "must be integer"]),
        ("run.workers=few", ["run.workers: 'few' is no number of ranks"]),
        ("training.zero_stage=seven", ["training.zero_stage = 'seven'", "must be integer|auto"]),
        ("training.global_batch=100000", ["training.global_batch = 100,000 is 4,167 times the 24 images"]),
        ("optimizer.warmup=1000 steps", ["optimizer.warmup = '1000 steps' (1,000 steps): so many do not fit"]),
        ("data.mean=[124, 116, 104]", ["data.mean = [124.0, 116.0, 104.0]", "[0.486, 0.455, 0.408] would do"]),
        ("optimizer.weight_decay=1000", ["optimizer.learning_rate = 0.002 times", "weight_decay = 1000 is 2"]),
        ("modell.name=S/16", ["unknown key 'modell'", "did you mean 'model'?"]),
        ("whatever.name=S/16", ["unknown key 'whatever' on the command line. Keys at the top level"]),
        ("registry.name=a\tb", ["registry.name", "column 2"]),
        ("model.depth=1000000000", ["depth = 1000000000: at most"]),
    ],
)
def test_a_newcomers_slip_is_told_in_one_message(home, corpus, monkeypatch, tmp_path, word, parts):
    monkeypatch.setattr(stage, "run_ranks", started)
    (tmp_path / "file").write_text("")
    filled = {"long": "x" * 400, "deep": "y/" * 3000, "nines": "9" * 400, "file": tmp_path / "file"}
    for name, value in filled.items():
        word = word.replace(f"{{{name}}}", str(value))
    said = outcome(monkeypatch, pretrain, corpus, word)
    for part in parts:
        assert part in said
    lines = said.splitlines()
    assert len(set(lines)) == len(lines) <= 2
    assert not re.match(r"(\w+): \1\.", said)  # a section's name in front of its key
    assert not (home / "runs").exists()


def test_a_home_that_can_be_none_is_named_by_its_variable(home, corpus, monkeypatch):
    monkeypatch.setenv("VITFORGE_HOME", "/dev/null/x")
    assert outcome(monkeypatch, pretrain, corpus, "run.name=x").startswith(
        "VITFORGE_HOME = '/dev/null/x': /dev/null is"
    )


@pytest.mark.parametrize(("module", "words"), [(demo, []), (evaluate, [str(PACKAGE), "CORPUS"])])
def test_every_command_with_a_home_refuses_one_that_can_be_none(home, corpus, monkeypatch, module, words):
    words = [word.replace("CORPUS", str(corpus.path)) for word in words]
    monkeypatch.setattr(sys, "argv", [module.__name__, *words, "home=/dev/null/x"])
    with pytest.raises(ValueError, match=r"home = '/dev/null/x': /dev/null is a file"):
        module.main()


def test_names_that_can_be_are_taken(home, corpus, monkeypatch):
    monkeypatch.setattr(stage, "run_ranks", started)
    for name in ("a" * 250, "2026-01-01", "a.lock", "CON"):
        assert outcome(monkeypatch, pretrain, corpus, f"run.name={name}") == "accepted"


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"width": 1 << 16, "mlp_dim": 1 << 18, "depth": 1000, "heads": 512}, "beyond what can be trained"),
        ({"image_size": 1 << 14, "patch_size": 16, "depth": 24}, "1,048,576 tokens"),
        ({"width": 12288, "mlp_dim": 49152, "depth": 120, "heads": 96}, "its weights alone take"),
    ],
)
def test_a_model_that_fits_nowhere_is_refused_before_it_is_built(home, changes, part):
    values = {"image_size": 224, "patch_size": 16, "width": 384, "depth": 12, "mlp_dim": 1536, "heads": 6}
    config = VitConfig(**{**values, **changes}, num_classes=2, pool="gap")
    with pytest.raises(ValueError, match=re.escape(part)):
        check_model_size(config)
