"""What is done with finished corpora and with shards of others: showing, indexing."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.corpus import Corpus
from data_prep.distributions import Distribution, measure
from data_prep.show import describe, draw
from tests.corpora import encoded, image_folder, make_corpus

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "data_prep" / script), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


# --------------------------------------------------------------------------------------------------------- show


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("show")
    source = image_folder(folder / "images", classes=3, images=6)
    for place in range(4):
        (source / "c1" / f"more {place}.jpg").write_bytes(encoded(500 + place, (90, 200)))
    (source / "c0" / "damaged.jpg").write_bytes(encoded(9)[:-40])
    (source / "c2" / "page.jpg").write_bytes(b"<html>nothing</html>")
    (source / "c2" / "gray.png").write_bytes(encoded(10, (30, 30), "PNG"))
    Image.fromarray(np.full((64, 64), 40000, np.uint16)).save(source / "c2" / "deep.png")
    (source / "empty").mkdir()
    return make_corpus(source, folder / "corpus")


def test_show_counts_what_is_there(corpus):
    text = "\n".join(describe(corpus, measure(corpus), classes=10))
    assert "24 images of 4 classes (one class an image)" in text
    assert f"{len(corpus.shard_sizes)} shards" in text
    assert corpus.corpus_hash in text
    assert "left out: 2 images" in text
    assert "  1 x no JPEG, PNG, WebP, BMP or TIFF: begins with '<html>nothing</html>'" in text
    assert "images of a class: 0 to 10, median 7; 1 classes without any" in text
    lines = [line.split() for line in text.splitlines()]
    shown = {line[0]: line[1:] for line in lines if line and line[0] in (*corpus.classes,)}
    assert shown == {"c1": ["10", "█" * 40], "c2": ["8", "█" * 32], "c0": ["6", "█" * 24], "empty": ["0"]}
    assert ["30", "19"] in [line[:2] for line in lines], "images whose shorter side has 30 pixels"
    assert ["90", "4"] in [line[:2] for line in lines]


def test_show_lists_the_largest_and_the_smallest_classes(corpus):
    lines = list(describe(corpus, [], classes=1))
    place = lines.index("  ... 2 more classes ...")
    assert lines[place - 1].split()[0] == "c1"
    assert lines[place + 1].split()[0] == "empty"


@pytest.mark.parametrize("spread", [1, 30, 1000])
def test_bars_hold_every_image_once_on_round_numbers(spread):
    rng = np.random.default_rng(spread)
    values = np.concatenate([rng.integers(200, 200 + spread, 3000), [1, 60000]])
    distribution = Distribution("side", "pixels", 1, np.bincount(values))
    bars = distribution.bars()
    assert len(bars) <= 14
    for bar in bars:
        inside = (values >= bar.low) & (values < bar.high if bar.high > bar.low else values == bar.low)
        assert bar.images == inside.sum()
    assert sum(bar.images for bar in bars) == len(values)
    assert distribution.quantile(0) == 1
    assert distribution.quantile(1) == 60000
    assert distribution.quantile(0.5) == np.sort(values)[(len(values) - 1) // 2]


def test_show_draws_the_images_of_the_corpus(corpus, tmp_path):
    sheet, histograms = draw(corpus, measure(corpus), tmp_path / "new" / "looks", images=1000, seed=0)
    assert sorted(path.name for path in sheet.parent.iterdir()) == ["corpus-histograms.png", "corpus-images.png"]
    with Image.open(histograms) as picture:
        assert picture.width > 1000
    with Image.open(sheet) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    # 24 images in 6 columns by class, then id; the sixteen-bit one is a plain gray of 40000 / 257
    deep = next(i for i in range(24) if corpus.origin(i) == "c2/deep.png")
    order = np.lexsort((np.arange(24), corpus.index["label"]))
    place = order.tolist().index(deep)
    cell = pixels[30 + place // 6 * 200 :, 10 + place % 6 * 170 :][:160, :160]
    assert (cell == 40000 // 257).all()
    first = sheet.read_bytes()
    assert draw(corpus, measure(corpus), tmp_path, images=5, seed=1)[0].read_bytes() != first
    small = (tmp_path / "corpus-images.png").read_bytes()
    assert draw(corpus, measure(corpus), tmp_path, images=5, seed=1)[0].read_bytes() == small
    assert draw(corpus, measure(corpus), tmp_path, images=5, seed=2)[0].read_bytes() != small


def test_show_as_a_command(corpus, tmp_path):
    done = run("show.py", corpus.path, "images=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "24 images of 4 classes" in done.stdout
    assert f"drew {tmp_path / 'corpus-images.png'}" in done.stdout
    assert (tmp_path / "corpus-images.png").is_file()
    job = tmp_path / "working_dir_files" / "job"
    job.mkdir(parents=True)
    done = run("show.py", corpus.path, cwd=job)
    assert done.returncode == 2
    assert done.stderr.startswith("error: output = '.' is relative, but this job runs in a temporary copy")
    done = run("show.py", corpus.path, f"output={corpus.path / 'manifest.json'}", cwd=tmp_path)
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert list(job.iterdir()) == []
