"""Pictures and printed lists of classes whose names are text of any kind."""

import re
import sys

import pytest
import torch
from PIL import Image

from data_prep import show
from pipeline.pictures import curves_of, draw_batch, draw_curves, label_lines
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


def rows(steps: int = 100, every: int = 20) -> list[dict[str, float]]:
    found: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        row: dict[str, float] = {"step": step, "loss": 2 / step, "learning_rate": 0.1, "images_per_second": 9.0}
        if step % every == 0:
            row |= {"heldout/loss": 1 + step / 100, "heldout/top1": 0.3 + step / 1000, "heldout/top5": 0.8}
        found.append(row)
    return found


def panels(*arguments):
    """Titles, and of each panel the curves by label with their points."""
    figure = curves_of(*arguments)
    shown = {
        axis.get_title(): {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axis.get_lines()}
        for axis in figure.axes if axis.get_title()
    }  # fmt: skip
    return figure, shown


def test_losses_are_beside_each_other_accuracy_is_in_per_cent_and_epochs_above_the_steps():
    figure, shown = panels(rows(), 25.0, 60)
    assert len(shown["loss"]["training"]) == 100
    assert shown["loss"]["held-out"] == [(step, pytest.approx(1 + step / 100)) for step in (20, 40, 60, 80, 100)]
    assert shown["held-out accuracy in %"]["top-1"][0] == (20, pytest.approx(32))
    assert "handed over" in shown["loss"]
    epochs = [axis.get_xlabel() for axis in figure.axes[0].child_axes]
    assert epochs == ["epoch"]
    assert figure.axes[0].child_axes[0]._functions[0](50) == 2
    assert figure.get_suptitle() == "step 100 (epoch 4): held-out top-1 40.00 %"


@pytest.mark.parametrize("every", [100, 200])
def test_no_panel_has_a_single_point(every, tmp_path):
    figure, shown = panels(rows(every=every), 25.0)
    assert "held-out accuracy in %" not in shown
    assert all(max(map(len, curves.values())) > 1 for curves in shown.values())
    assert ("held-out top-1 40.00 %" in figure.get_suptitle()) == (every == 100)
    for few in ([], rows(1)):
        assert panels(few)[1] == {}
        draw_curves(few, tmp_path / "curves.png")


def test_the_first_batch_says_what_the_model_is_told_of_each_image(tmp_path):
    targets = torch.tensor([[1, 0, 0], [0.7, 0, 0.3], [0, 1, 1], [0.5, 0.3, 0.2], [0, 0, 0.0], [0.003, 0.997, 0]])
    lines = label_lines(targets, ["ant", "bee", "a very long name of a class"])
    assert lines[:2] == ["ant", "ant 70 %\na very lo... 30 %"]
    assert lines[2:] == ["bee\na very long nam...", "ant 50 %\nbee 30 % ...", "", "bee"]
    draw_batch(torch.zeros(6, 3, 8, 8), (0.5,) * 3, (0.5,) * 3, lines, tmp_path / "batch.png")
    with Image.open(tmp_path / "batch.png") as image:
        assert image.info["Description"].startswith("ant; ant 70 %, a very lo... 30 %; ")
