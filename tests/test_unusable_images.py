"""Images that cannot be had or crash a decoder: left out with the reason, and only they."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import simplejpeg
from PIL import Image

from data_prep import source_reader
from data_prep.corpus import Corpus
from data_prep.corpus_format import QUARANTINE
from data_prep.decoder_process import guarded, refuse_deadly
from data_prep.image_check import UnusableImage, check_image
from data_prep.listing import SourceError
from data_prep.perceptual_hash import describe_images
from data_prep.source_settings import SourceSettings
from data_prep.sources import list_source
from data_prep.verify import verify
from tests.corpora import encoded, image_folder
from tests.running import REPOSITORY, environment
from tests.test_sharding import shard

CRASHING = """
import os, signal
__path__.append({folder!r})
exec(compile(open({init!r}).read(), {init!r}, "exec"))
_decode = decode_jpeg
def decode_jpeg(data, *args, **kwargs):
    if bytes(data).endswith(b"deadly"):
        os.kill(os.getpid(), signal.{signal})
    return _decode(data, *args, **kwargs)
"""
"""The decoder, but with an image on which it crashes: none is known of the real one."""


def crashing_decoder(place: Path, signal: str = "SIGSEGV") -> str:
    """A folder for PYTHONPATH in which the decoder ends its process on images that end with `deadly`."""
    real = Path(simplejpeg.__file__)
    (place / "simplejpeg").mkdir(parents=True)
    (place / "simplejpeg" / "__init__.py").write_text(
        CRASHING.format(folder=str(real.parent), init=str(real), signal=signal)
    )
    return str(place)


@pytest.mark.parametrize("words", [[], pytest.param(["workers=2"], marks=pytest.mark.slow)])  # here, and on Ray
def test_an_image_on_which_the_decoder_crashes_is_found_and_left_out(tmp_path, words):
    source = image_folder(tmp_path / "images", classes=2, images=10)
    victim = source / "c1" / "004.JPEG"
    victim.write_bytes(victim.read_bytes() + b"deadly")
    result = subprocess.run(
        [sys.executable, "data_prep/shard.py", source, tmp_path / "corpus", "shard_mb=0.01", "dedup=true", *words],
        cwd=REPOSITORY, env=environment(tmp_path / "home", PYTHONPATH=crashing_decoder(tmp_path / "decoder")),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "its process ended 2 times" in result.stderr
    corpus = Corpus.open(str(tmp_path / "corpus"))
    assert [json.loads(line) for line in (corpus.path / QUARANTINE).open()] == [
        {"origin": "c1/004.JPEG", "reason": "a decoder crashes on it (SIGSEGV)"}
    ]
    victim.unlink()
    assert sorted(corpus.origins()) == sorted(str(path.relative_to(source)) for path in source.rglob("*.JPEG"))
    assert list(verify(corpus)) == []


def test_what_is_not_the_images_fault_is_no_reason_to_leave_it_out(tmp_path, monkeypatch):
    """A kernel without memory kills, too; and a process that does not start says nothing of any image."""
    refuse_deadly(encoded(0) + b"deadly")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(crashing_decoder(tmp_path / "killed", "SIGKILL"))
        with guarded():
            refuse_deadly(encoded(0))
            refuse_deadly(b"no image")
            with pytest.raises(OSError, match=r"ended \(SIGKILL\) on one of .* bytes: is memory enough"):
                refuse_deadly(encoded(0) + b"deadly")
            refuse_deadly(encoded(1))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "simplejpeg.py").write_text("raise ImportError('not here')")
    monkeypatch.syspath_prepend(str(broken))
    with guarded(), pytest.raises(OSError, match="did not start"):
        refuse_deadly(encoded(0))


def test_a_picture_too_large_for_sharding_takes_no_copy_of_it_away(tmp_path):
    small = Image.open(image_folder(tmp_path / "images", classes=1, images=1) / "c0" / "000.JPEG").convert("L")
    small.resize((13_400, 13_400)).save(tmp_path / "large.jpg", quality=50)
    large = (tmp_path / "large.jpg").read_bytes()
    with pytest.raises(UnusableImage, match="too large"):
        check_image(large)
    assert not describe_images([large])["pictured"][0]


def test_an_image_that_would_take_all_memory_is_refused_by_its_header():
    image = bytearray(encoded(0))
    frame = image.index(b"\xff\xc0") + 5
    image[frame : frame + 4] = (20_000).to_bytes(2, "big") * 2
    with pytest.raises(UnusableImage, match="too large: 20000x20000 pixels, more than 178,956,970"):
        check_image(bytes(image))


def test_files_that_cannot_be_read_are_left_out_with_the_reason(ray, tmp_path):
    source = image_folder(tmp_path / "images", classes=2, images=10)
    (source / "c0" / "gone.JPEG").symlink_to(tmp_path / "nothing")
    (source / "c1" / "bad-sector.JPEG").symlink_to("/proc/self/mem")  # whose reading fails like that of a broken disk
    corpus = shard(source, tmp_path / "corpus")
    assert len(corpus) == 20
    assert {entry["origin"]: entry["reason"] for entry in map(json.loads, (corpus.path / QUARANTINE).open())} == {
        "c0/gone.JPEG": "a link to a file that is not there",
        "c1/bad-sector.JPEG": "cannot be read: Input/output error",
    }
    (tmp_path / "nothing").write_bytes(encoded(77))
    more = shard(source, tmp_path / "corpus", append=True, max_failures=0.5)
    assert len(more) == 21
    assert "c0/gone.JPEG" in set(more.origins())


def test_a_source_of_which_much_cannot_be_read_is_one_error_and_nothing_is_left_out(tmp_path, monkeypatch):
    """As where a mount is away: what is left out is lost, and each node would leave out something else."""
    source = image_folder(tmp_path / "images", classes=2, images=30)
    for number in range(12):
        (source / "c1" / f"far-{number}.JPEG").symlink_to("/proc/self/mem")
    monkeypatch.setattr(source_reader, "_PAUSES", (0.01,))
    listing = list_source(SourceSettings(source=str(source)))
    with pytest.raises(OSError, match=r"11 of 72 files of the source, .*far-.*cannot be read: Input/output error"):
        list(listing.images.groups(listing.names, listing.sizes))


def test_a_link_that_was_whole_when_it_was_listed_is_not_left_out(tmp_path):
    source = image_folder(tmp_path / "images", classes=2, images=4)
    (tmp_path / "elsewhere").write_bytes(encoded(5))
    (source / "c0" / "link.JPEG").symlink_to(tmp_path / "elsewhere")
    listing = list_source(SourceSettings(source=str(source)))
    (tmp_path / "elsewhere").unlink()
    with pytest.raises(SourceError, match=r"link\.JPEG is gone: it was there when the source was listed"):
        list(listing.images.groups(listing.names, listing.sizes))


def test_links_in_a_circle_are_no_folders(ray, tmp_path):
    source = image_folder(tmp_path / "images", classes=2, images=4)
    (source / "c0" / "circle.JPEG").symlink_to(source / "c0" / "circle.JPEG")
    corpus = shard(source, tmp_path / "corpus")
    assert len(corpus) == 8
    assert [json.loads(line)["origin"] for line in (corpus.path / QUARANTINE).open()] == ["c0/circle.JPEG"]
