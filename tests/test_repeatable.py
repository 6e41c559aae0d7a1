"""The same source gives the same bytes, whenever and wherever it is sharded, its damaged images too."""

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_prep.image_check import UnusableImage, check_image
from data_prep.reasons import repeatable
from tests.corpora import encoded
from tests.mutations import mutate_bytes
from tests.running import REPOSITORY

MAKE = """
import sys
from pathlib import Path
from tests.corpora import make_corpus
padding = [bytearray(7919 * number) for number in range(int(sys.argv[3]))]  # other addresses
make_corpus(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def damaged_images(folder: Path) -> int:
    """One image of every kind of damage, of every format; how many."""
    formats: list[tuple[str, str, dict[str, object]]] = [
        ("JPEG", "RGB", {}), ("JPEG", "CMYK", {}), ("PNG", "RGB", {}), ("PNG", "P", {}), ("WEBP", "RGB", {}),
        ("WEBP", "RGBA", {"lossless": True}), ("BMP", "RGB", {}), ("TIFF", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ]  # fmt: skip
    chance = random.Random(3)
    contents: list[bytes] = [b"", b"text", bytes(500), b"GIF89a" + bytes(50), b"\0\0\0 ftypavif", b"RIFF\0\0\0\0WEBP"]
    for number, (kind, mode, options) in enumerate(formats):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(encoded(number))).convert(mode).save(buffer, kind, **options)
        whole = buffer.getvalue()
        contents += [whole[:12], whole[:40], whole[: len(whole) // 2], whole[:-8], whole[:20] + bytes(40) + whole[60:]]
        contents += [mutate_bytes(chance, whole) for _ in range(10)]
    for number, content in enumerate(contents):
        (folder / f"{number:03d}.jpg").write_bytes(content)
    return len(contents)


def test_no_byte_of_a_corpus_differs_from_run_to_run(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("c1", "c0"):
        (source / name).mkdir(parents=True)
    count = damaged_images(source / "c0")
    for number in range(5):
        (source / "c1" / f"{number}.jpg").write_bytes(encoded(number))
    made = []
    for run in ("1", "2"):
        (tmp_path / f"tmp{run}").mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": run, "TMPDIR": str(tmp_path / f"tmp{run}"), "TZ": f"UTC-{run}"}
        words = [sys.executable, "-c", MAKE, str(source), str(tmp_path / run), run]
        subprocess.run(words, cwd=REPOSITORY, env=environment, check=True, timeout=120)
        made.append({path.name: path.read_bytes() for path in (tmp_path / run).iterdir()})
    assert made[0] == made[1]
    entries = [json.loads(line) for line in made[0]["quarantine.jsonl"].splitlines()]
    assert len(entries) > count // 2, "the damage must be found"
    assert " at 0x" not in made[0]["quarantine.jsonl"].decode()
    assert str(tmp_path) not in made[0]["quarantine.jsonl"].decode()


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("cannot identify image file <_io.BytesIO object at 0x7f1c2a3b4c5d>", "cannot identify image file"),
        ("error at 0x7f1c2a3b4c5d in decoder", "error in decoder"),
        ("pointer 0x00007f1c2a3b4c5d", "pointer"),
        ("Unsupported marker type 0x7b", "Unsupported marker type 0x7b"),
        ("/proc/self/fd/17: bad", "a file: bad"),
        ("/proc/4711/fd/17: bad", "a file: bad"),
        ("decoder (pid 123) ended", "decoder (pid) ended"),
        ("two\nlines\x1b[2J\0", "two lines [2J "),
        ("\udcff", "\\udcff"),
        ("x" * 5000, "x" * 297 + "..."),
    ],
)
def test_what_differs_from_run_to_run_is_taken_out_of_a_reason(reason: str, expected: str) -> None:
    assert repeatable(reason) == expected
    assert str(UnusableImage(reason)) == expected


def test_a_temporary_folder_is_no_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert repeatable(f"cannot open '{tmp_path}/vitforge-1234/x.tif' now") == "cannot open 'a temporary file' now"


def test_an_image_that_pillow_does_not_know_has_the_same_reason_each_time() -> None:
    reasons = set()
    keep = []
    for _ in range(3):
        with pytest.raises(UnusableImage) as caught:
            check_image(b"\x89PNG\r\n\x1a\n" + bytes(40))
        reasons.add(str(caught.value))
        keep.append(io.BytesIO(bytes(1000)))
    assert len(reasons) == 1
