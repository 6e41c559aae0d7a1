"""Names that others chose never become paths elsewhere: every command refuses them, on a disk and on a store."""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.folders import Folder, LocalFolder, folder_at
from cluster.storage import StorageError
from data_prep.copy_corpus import CopySettings, copy_corpus
from data_prep.corpus import Corpus
from data_prep.corpus_format import INDEX, MANIFEST, SHARDS_AT, CorpusError, manifest_hash
from data_prep.shard import ShardSettings, shard_corpus
from data_prep.source_settings import SourceSettings
from data_prep.sources import list_source
from data_prep.subset import SubsetSettings, make_parts
from pipeline.corpora import open_corpora
from pipeline.data_config import DataSettings
from tests.corpora import image_folder, make_corpus
from tests.running import script
from tests.s3_server import S3Server

NAMES = ["../stolen", "/tmp/stolen", "a/../../stolen", "..", ".", "", "a\\b", "a\0b", "a\nb", "x" * 256, "a/b"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITFORGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("hostile") / "source")


@pytest.fixture
def place(source: Path, tmp_path: Path) -> Folder:
    return make_corpus(source, tmp_path / "corpus").folder


def rewrite(folder: Folder, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a manifest, and makes its own checksum anew."""
    manifest = folder.read_json(MANIFEST)
    change(manifest)
    manifest["corpus_hash"] = manifest_hash(manifest)
    folder.write_bytes(MANIFEST, json.dumps(manifest).encode())


def call_file(name: str) -> Callable[[dict[str, Any]], object]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = dict(manifest["files"][INDEX])

    return change


def call_shard(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["shards"][0].update(name=name)


def say_shards_at(place: object) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest.update({SHARDS_AT: place})


def openers(folder: Folder, elsewhere: Path, source: Path) -> Iterator[Callable[[], object]]:
    """Everything that opens a corpus, ready to be called."""
    url = folder.url
    yield lambda: Corpus.open(url)
    yield lambda: Corpus.open(url, check="sizes")
    yield lambda: copy_corpus(CopySettings(source=url, destination=str(elsewhere / "copy")))
    yield lambda: make_parts(SubsetSettings(corpus=url, destination=str(elsewhere / "parts"), holdout=0.2))
    yield lambda: shard_corpus(ShardSettings(source=str(source), destination=url, append=True))
    yield lambda: list_source(SourceSettings(source=url))
    yield lambda: open_corpora(DataSettings(corpus=url, image_size=16))


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_no_name_of_a_manifest_leads_elsewhere(name: str, place: Folder, source: Path, tmp_path: Path) -> None:
    for change in (call_file(name), call_shard(name), call_shard(f"{name}.tar" if name.strip(".") else "../x.tar")):
        before = place.read_bytes(MANIFEST)
        rewrite(place, change)
        there = {path for path in tmp_path.rglob("*") if path.is_file()}
        for opener in openers(place, tmp_path / "elsewhere", source):
            with pytest.raises(CorpusError, match=r"manifest\.json"):
                opener()
        assert {path for path in tmp_path.rglob("*") if path.is_file()} == there
        place.write_bytes(MANIFEST, before)


def commands(corpus: str, source: str, elsewhere: str) -> dict[str, list[str]]:
    """Every command that opens a corpus, once for each place of its command line that one may stand in."""
    run = [f"data.corpus={corpus}", f"run.home={elsewhere}/home"]
    return {
        "append": ["data_prep/shard.py", source, corpus, "append=true"],
        "shard anew": ["data_prep/shard.py", corpus, f"{elsewhere}/anew"],
        "exclude": ["data_prep/shard.py", source, f"{elsewhere}/apart", f"exclude=[{corpus}]"],
        "verify": ["data_prep/verify.py", corpus],
        "show": ["data_prep/show.py", corpus],
        "subset": ["data_prep/subset.py", corpus, f"{elsewhere}/parts", "holdout=0.2"],
        "copy": ["data_prep/copy_corpus.py", corpus, f"{elsewhere}/copy"],
        "pretrain": ["pipeline/pretrain.py", "demo", *run],
        "finetune": ["pipeline/finetune.py", "demo", "parent=models:/nobody/1", *run],
        "evaluate": ["pipeline/evaluate.py", "models:/nobody/1", corpus, f"home={elsewhere}/home"],
    }


@pytest.mark.slow
def test_every_command_refuses_a_hostile_manifest_and_touches_nothing(
    place: Folder, source: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "home" / ".bashrc"
    victim.parent.mkdir()
    victim.write_text("mine")
    rewrite(place, call_file(str(victim)))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def run(words: list[str]) -> subprocess.CompletedProcess[str]:
        return script(tmp_path / "vitforge", *words, VITFORGE_CACHE=str(tmp_path / "cache"))

    asked = commands(place.url, str(source), str(tmp_path / "elsewhere"))
    with ThreadPoolExecutor(2) as pool:
        answers = dict(zip(asked, pool.map(run, asked.values()), strict=True))
    for name, answer in answers.items():
        assert answer.returncode == 2, (name, answer.stderr)
        assert "manifest.json" in answer.stderr, name
        assert "Traceback" not in answer.stderr, name
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: written.get(path) for path in before} == before
    assert {path.relative_to(tmp_path).parts[0] for path in written.keys() - before.keys()} <= {"vitforge", "cache"}


def test_a_corpus_of_a_stranger_on_a_store_writes_nothing_outside_the_cache(
    place: Folder, source: Path, s3: S3Server, tmp_path: Path
) -> None:
    victim = tmp_path / "home" / ".bashrc"
    victim.parent.mkdir()
    victim.write_text("mine")
    names = (str(victim), "../" * 12 + str(victim).lstrip("/"), "../../home/.bashrc")
    for number, name in enumerate(names):
        store = folder_at(s3.bucket() + f"/corpora/{number}", "test")
        for file in place.tree():
            store.put(Path(place.url, file), file)
        rewrite(store, call_file(name))
        for opener in openers(store, tmp_path / "elsewhere", source):
            with pytest.raises(CorpusError, match=r"manifest\.json"):
                opener()
        assert victim.read_text() == "mine"
    assert not (tmp_path / "elsewhere" / "copy").exists()


def test_only_a_subset_leads_up_and_never_to_another_place_of_a_store(
    place: Folder, s3: S3Server, tmp_path: Path
) -> None:
    part = make_parts(SubsetSettings(corpus=place.url, destination=str(tmp_path / "parts"), holdout=0.2))["train"]
    assert part.shards_folder == place
    for shards_at in ("/etc", "a/../../b", "..\\x", "..//../\0", 7):
        rewrite(part.folder, say_shards_at(shards_at))
        with pytest.raises(CorpusError, match=r"manifest\.json"):
            Corpus.open(part.folder)
    rewrite(part.folder, say_shards_at("../../../another-bucket/corpus"))
    store = folder_at(s3.bucket() + "/corpora/part", "test")
    for file in part.folder.tree():
        store.put(part.path / file, file)
    with pytest.raises(CorpusError, match="another bucket"):
        Corpus.open(store)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "..", "a\0b"], ids=repr)
def test_a_folder_gives_and_takes_nothing_outside_of_it(name: str, s3: S3Server, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    actions: list[Callable[[Folder], object]] = [
        lambda folder: folder.read_bytes(name),
        lambda folder: folder.write_bytes(name, b"theirs"),
        lambda folder: folder.put(tmp_path / "x", name),
        lambda folder: folder.get(name, tmp_path / "got"),
        lambda folder: folder.remove(name),
        lambda folder: folder.size(name),
        lambda folder: folder.open(name),
        lambda folder: folder.child(name).remove_tree(re.compile(".*")),
        lambda folder: folder.swap(name, b"theirs", None),
    ]
    for folder in (LocalFolder(tmp_path / "inside"), folder_at(s3.bucket() + "/inside", "test")):
        folder.write_bytes("a/b.txt", b"inside")
        for action in actions:
            with pytest.raises(StorageError, match="the name"):
                action(folder)
        assert folder.read_bytes("a/b.txt") == b"inside"
    assert (tmp_path / "x").read_text() == "mine"
