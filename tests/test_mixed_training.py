"""Whole runs on a mixture, with samples that went bad: two ranks, a held-out corpus of one part, a restart."""

import json
import re
import sys

import numpy as np
import pytest

from data_prep.mixture import Mixture
from pipeline import pretrain
from tests.corpora import image_folder, make_corpus, overwrite
from tests.running import losses, torchrun
from tests.test_training import TINY

HTML = b"<html><body>503 Slow Down</body></html>"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    first = make_corpus(image_folder(root / "first" / "images", classes=3, images=12), root / "a")
    second = make_corpus(image_folder(root / "second" / "images", classes=4, images=8), root / "b")
    overwrite(second, 5, HTML)
    overwrite(first, 11, HTML)
    return root / "home", first, second


def words(places, name, *overrides):
    _, first, second = places
    parts = f"[{{corpus: {first.path}, weight: 0.7}}, {{corpus: {second.path}, weight: 0.3}}]"
    return [
        *TINY, f"run.name={name}", "data.corpus=null", f"data.mixture={parts}", f"data.heldout={first.path}",
        "training.duration=20 steps", "checkpoint.every=10 steps", "log.samples=true", *overrides,
    ]  # fmt: skip


def shown(home, name, ranks):
    """The samples of each step, in the order of the ranks."""
    rows = [
        [json.loads(line)["ids"] for line in path.read_text().splitlines()]
        for path in sorted((home / "runs" / name / "samples").iterdir())
    ]
    assert len(rows) == ranks
    return [np.concatenate(parts).tolist() for parts in zip(*rows, strict=True)]


def test_a_run_on_a_mixture_with_bad_samples_is_the_same_on_one_rank_and_two(places):
    home, first, second = places
    outputs = []
    for ranks in (1, 2):
        done = torchrun(ranks, home, *words(places, f"ranks{ranks}"))
        assert done.returncode == 0, done.stderr[-6000:]
        outputs.append(done.stderr)
    one, two = shown(home, "ranks1", 1), shown(home, "ranks2", 2)
    assert one == two
    assert len(one) == 20
    mixture = Mixture([first, second], [7, 3])
    ids = np.concatenate(one)
    assert not {11, 36 + 5} & set(ids.tolist())
    assert abs((mixture.part_of(ids) == 1).sum() - 0.3 * len(ids)) < 1
    curves = [losses(home / "runs" / name / "metrics.jsonl") for name in ("ranks1", "ranks2")]
    for step in range(1, 21):
        assert curves[0][step] == pytest.approx(curves[1][step], rel=1e-4)
    for output in outputs:
        assert re.search(r"step 20/20, .*, \d+ bad samples replaced", output)
        assert "(35 images, 1 bad ones left out)" in output


def test_another_mixture_is_another_corpus(places, monkeypatch):
    home, _, second = places
    monkeypatch.setenv("VITFORGE_HOME", str(home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def error_of(*overrides, weight="0.3"):
        command = [word.replace("0.3", weight) for word in words(places, "ranks1", *overrides)]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(ValueError) as caught:  # noqa: PT011 the message is what this is about
            pretrain.main()
        return str(caught.value)

    assert "another corpus" in error_of(weight="0.4")
    assert "other classes than the training images" in error_of("data.mixture_classes=separate")
    (second.path / "index.bin").write_bytes(b"")
    assert str(second.path) in error_of()
