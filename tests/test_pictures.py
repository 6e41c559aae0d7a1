"""Pictures and printed lists of classes whose names are text of any kind."""

import re
import sys

import pytest
import torch
from PIL import Image

from data_prep import show
from pipeline.pictures import draw_batch
from tests.corpora import image_folder, make_corpus

NAMES = ["$x^", "$\\frac{a", "cat\x1b[2J\x07", "a\nb\r\tc", "\u202etxt", "Hündin 猫", "%s {x} \\"]


def test_names_of_classes_are_text_wherever_they_are_shown(tmp_path, monkeypatch, capsys):
    source = image_folder(tmp_path / "images", classes=len(NAMES), images=2)
    for number, name in enumerate(NAMES):
        (source / f"c{number}").rename(source / name)
    corpus = make_corpus(source, tmp_path / "corpus")
    assert sorted(corpus.classes) == sorted(NAMES)
    monkeypatch.setattr(sys, "argv", ["show.py", str(corpus.path), f"output={tmp_path}"])
    show.main()
    said = capsys.readouterr().out
    assert r"cat\x1b[2J\x07" in said
    assert r"a\nb\r\tc" in said
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", said)
    draw_batch(torch.zeros(len(NAMES), 3, 8, 8), (0.5,) * 3, (0.5,) * 3, corpus.classes, tmp_path / "batch.png")
    for picture in ("batch.png", "corpus-images.png", "corpus-histograms.png"):
        with Image.open(tmp_path / picture) as image:
            image.load()


@pytest.mark.parametrize("name", ["$\\int_0$$", "caf\udce9"])
def test_a_name_that_is_no_formula_ends_no_drawing(name, tmp_path):
    draw_batch(torch.zeros(1, 3, 8, 8), (0.5,) * 3, (0.5,) * 3, [name], tmp_path / "batch.png")
    assert (tmp_path / "batch.png").stat().st_size > 0
