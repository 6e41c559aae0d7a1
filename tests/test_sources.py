"""Every kind of source gives the corpus that the same images in class folders give; what cannot be had is said."""

import gzip
import http.server
import io
import itertools
import json
import os
import tarfile
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.corpus import Corpus
from data_prep.listing import SourceError
from data_prep.shard import ShardSettings, shard_corpus
from data_prep.source_settings import SourceSettings
from data_prep.sources import list_source
from data_prep.verify import verify
from tests.corpora import encoded, image_folder

pytestmark = pytest.mark.usefixtures("ray")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VITFORGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    return image_folder(tmp_path / "images", classes=3, images=12)


def shard(source: object, destination: Path, **settings: Any) -> Corpus:
    values: dict[str, Any] = {"shard_mb": 0.01} | {
        key: str(v) if isinstance(v, Path) else v for key, v in settings.items()
    }
    corpus = shard_corpus(ShardSettings(source=str(source), destination=str(destination), **values))
    assert list(verify(corpus)) == []
    return corpus


def tars_of(corpus: Corpus) -> list[str]:
    return [facts["xxh3_128"] for facts in corpus.manifest["shards"]]


def contents(corpus: Corpus) -> dict[str, tuple[bytes, list[tuple[str, float]]]]:
    """By origin: the image's bytes and its labels as names."""
    found = {}
    for sample in range(corpus.num_samples):
        _, classes, weights = corpus.labels_of([sample])
        labels = [
            (corpus.classes[number], round(float(weight), 6)) for number, weight in zip(classes, weights, strict=True)
        ]
        found[corpus.origin(sample)] = (corpus.read([sample])[0].tobytes(), labels)
    return found


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def class_tar(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in sorted(folder.iterdir(), reverse=True):
            add(tar, path.name, path.read_bytes())
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------------- tars


def incompressible(root: Path, count: int = 240) -> Path:
    """Class folders of images as large as photographs, so that a gzip file of them has many points."""
    for number in range(count):
        path = root / f"c{number % 3}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        # bytes after the end of an image are kept as they are
        path.write_bytes(encoded(number, (64, 48)) + os.urandom(150_000))
    return root


def gzip_tar(root: Path, form: str) -> Path:
    """The class folders as a tar that is compressed as a whole ("outer"), or has compressed class tars ("inner")..."""
    source = root.parent / f"source.tar{'' if form == 'inner' else '.gz'}"
    with tarfile.open(root.parent / "plain.tar", "w") as outer:
        for folder in sorted(root.iterdir(), reverse=True):
            if form == "folders":
                for path in folder.iterdir():
                    add(outer, f"all/{folder.name}/{path.name}", path.read_bytes())
            elif form == "inner":
                add(outer, f"{folder.name}.tar.gz", gzip.compress(class_tar(folder), 1))
            else:
                add(outer, f"{folder.name}.tar", class_tar(folder))
    plain = (root.parent / "plain.tar").read_bytes()
    if form == "members":  # several gzip members after one another, as parallel compressors write
        cuts = [0, 7_000_001, 20_000_000, len(plain)]
        plain = b"".join(gzip.compress(plain[a:b], 1) for a, b in itertools.pairwise(cuts))
    source.write_bytes(plain if form in ("inner", "members") else gzip.compress(plain, 1))
    return source


@pytest.mark.parametrize("form", ["outer", "inner", "members", "folders"])
def test_gzip_tars_give_the_same_corpus_and_are_decoded_once(tmp_path, messages, form):
    root = incompressible(tmp_path / "images")
    expected = shard(root, tmp_path / "expected", shard_mb=8)
    source = gzip_tar(root, form)
    corpus = shard(source, tmp_path / "corpus", shard_mb=8)
    assert tars_of(corpus) == tars_of(expected)
    assert contents(corpus).keys() == contents(expected).keys()
    assert "is kept in" in messages()
    again = shard(source, tmp_path / "again", shard_mb=8, workers=1)
    assert "is known from before" in messages()
    assert again.corpus_hash == corpus.corpus_hash


def test_what_decoding_a_gzip_tar_gave_is_made_again_where_it_is_damaged(folder, tmp_path, messages, monkeypatch):
    monkeypatch.setenv("VITFORGE_CACHE", str(tmp_path / "cache"))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in sorted(folder.rglob("*.JPEG")):
            add(tar, str(path.relative_to(folder)), path.read_bytes())
    (tmp_path / "source.tar.gz").write_bytes(gzip.compress(buffer.getvalue()))
    settings = SourceSettings(source=str(tmp_path / "source.tar.gz"))
    listed = list_source(settings)
    (kept,) = (tmp_path / "cache" / "gzip").glob("*.npz")
    whole = kept.read_bytes()
    for damaged in (whole[:-300], b"", whole[:200] + bytes(300) + whole[500:]):
        kept.write_bytes(damaged)
        again = list_source(settings)
        assert [again.names[row] for row in range(len(again))] == [listed.names[row] for row in range(len(listed))]
        assert "is damaged in" in messages()
        assert kept.read_bytes() == whole


def test_a_folder_inside_the_source_can_be_named(folder, tmp_path):
    with tarfile.open(tmp_path / "source.tar", "w") as tar:
        for path in sorted(folder.rglob("*.JPEG")):
            for split in ("train", "test") if path.parent.name == "c0" else ("train",):
                add(tar, f"./{split}/{path.relative_to(folder)}", path.read_bytes())
    corpus = shard(tmp_path / "source.tar", tmp_path / "corpus", inside="train")
    assert tars_of(corpus) == tars_of(shard(folder, tmp_path / "expected"))
    named = shard(tmp_path / "source.tar", tmp_path / "named", split="train")
    assert tars_of(named) == tars_of(corpus)
    with pytest.raises(SourceError, match=r"folders 'train', 'test' are splits and no classes"):
        shard(tmp_path / "source.tar", tmp_path / "splits")


# ------------------------------------------------------------------------------------------ validation and truth


IDS = ["n00000003", "n00000001", "n00000002"]
"""In the order of ILSVRC2012_ID, which is not that of the names."""


def validation_tar(tmp_path: Path) -> tuple[Path, Path, list[int]]:
    """A flat tar as ILSVRC2012_img_val.tar, its truth in numbers, and the same images in class folders."""
    truth = []
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for number in range(1, 21):
            name, which = f"ILSVRC2012_val_{number:08d}.JPEG", number * 7 % 3
            content = encoded(number, (40 + number, 30))
            add(tar, name, content)
            place = tmp_path / "in_folders" / IDS[which] / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
            truth.append(which + 1)
    (tmp_path / "data").mkdir()
    numbers = tmp_path / "data" / "ILSVRC2012_validation_ground_truth.txt"
    numbers.write_text("".join(f"{number}\n" for number in truth))
    return tmp_path / "val.tar", numbers, truth


@pytest.fixture
def validation(tmp_path):
    return validation_tar(tmp_path)


def write_meta(path: Path) -> None:
    import numpy as np
    from scipy.io import savemat

    rows = [(number, name, 0) for number, name in enumerate(IDS, 1)] + [(4, "n00000009", 3)]
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    savemat(path, {"synsets": np.array(rows, kind)[:, None]})


def test_validation_images_get_the_classes_of_the_training_images(validation, tmp_path):
    tar, numbers, truth = validation
    expected = shard(tmp_path / "in_folders", tmp_path / "expected")
    assert expected.classes == sorted(IDS)
    with pytest.raises(ValueError, match=r"what they mean is not known: give synsets=FILE, meta.mat"):
        shard(tar, tmp_path / "corpus", truth=numbers)
    (tmp_path / "order.txt").write_text("".join(f"{k} {name} some words\n" for k, name in enumerate(IDS, 1)))
    by_text = shard(tar, tmp_path / "by_text", truth=numbers, synsets=tmp_path / "order.txt")
    write_meta(numbers.with_name("meta.mat"))
    by_meta = shard(tar, tmp_path / "by_meta", truth=numbers)
    (tmp_path / "names.txt").write_text("".join(f"{IDS[number - 1]}\n" for number in truth))
    by_names = shard(tar, tmp_path / "by_names", truth=tmp_path / "names.txt")
    lines = [f"ILSVRC2012_val_{k:08d},{IDS[number - 1]} 1 2 3 4" for k, number in enumerate(truth, 1)]
    (tmp_path / "solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(lines)]))
    by_solution = shard(tar, tmp_path / "by_solution", truth=tmp_path / "solution.csv")
    (tmp_path / "flat").mkdir()
    with tarfile.open(tar) as packed:
        for member in packed:
            content = packed.extractfile(member)
            assert content is not None
            (tmp_path / "flat" / member.name).write_bytes(content.read())
    flat = shard(tmp_path / "flat", tmp_path / "from_flat", truth=numbers)
    for corpus in (by_text, by_meta, by_names, by_solution, flat):
        assert corpus.classes == expected.classes
        assert tars_of(corpus) == tars_of(expected)
        assert contents(corpus) == contents(expected)


def test_truth_that_does_not_fit_is_refused(validation, tmp_path):
    tar, numbers, _ = validation
    write_meta(numbers.with_name("meta.mat"))
    numbers.write_text("1\n2\n")
    with pytest.raises(ValueError, match="has 2 classes for 20 images"):
        shard(tar, tmp_path / "corpus", truth=numbers)
    numbers.write_text("".join("4\n" for _ in range(20)))
    with pytest.raises(ValueError, match="not within 1 to 3"):
        shard(tar, tmp_path / "corpus", truth=numbers)
    with pytest.raises(ValueError, match="give truth=FILE"):
        shard(tar, tmp_path / "corpus")
    with pytest.raises(
        ValueError, match=r"truth is not read: .* kind=corpus, and truth is for kind=folder and kind=tar"
    ):
        shard(tar, tmp_path / "corpus", truth=numbers, kind="corpus")


# -------------------------------------------------------------------------------------------------------- tables


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; some addresses fail, some for a while."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: dict[str, int] = {}
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked[self.path] = times = self.server.asked.get(self.path, 0) + 1
        if "throttled" in self.path and times < 3:
            self.send_response(503)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        file = self.server.root / path.lstrip("/")
        if "denied" in self.path or not file.is_file():
            self.send_error(403 if "denied" in self.path else 404)
            return
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:100] if "cut" in self.path and times < 2 else content)
        if "cut" in self.path and times < 2:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(folder):
    with Server(folder) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield serving
        serving.shutdown()


def test_images_are_fetched_where_a_table_says(folder, server, tmp_path):
    lines = ["url,label"]
    for number, path in enumerate(sorted(folder.rglob("*.JPEG"))):
        ask = {3: "?throttled", 5: "?cut", 7: "?denied"}.get(number, "")
        lines.append(f"{server.address}/{path.relative_to(folder)}{ask},{path.parent.name}")
    lines += [f"{server.address}/c0/missing.jpg,c0", f"{folder}/c1/004.JPEG,c2", "c0/away.jpg,c0"]
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    corpus = shard(tmp_path / "table.csv", tmp_path / "corpus", image_kb=1, fetch=True)
    assert corpus.label_kind == "single"
    reasons = {entry["origin"].split("/")[-1]: entry["reason"] for entry in corpus.quarantined()}
    assert reasons == {
        "007.JPEG?denied": "cannot be fetched: HTTP 403",
        "missing.jpg": "cannot be fetched: HTTP 404",
        "away.jpg": "cannot be read: No such file or directory",
    }
    assert corpus.num_samples == 36
    for origin, (image, labels) in contents(corpus).items():
        if origin.startswith("http"):
            path = folder / origin.removeprefix(f"{server.address}/").split("?")[0]
            assert (image, labels) == (path.read_bytes(), [(path.parent.name, 1.0)])
    assert sum(count for path, count in server.asked.items() if "throttled" in path) == 3
    assert sum(count for path, count in server.asked.items() if "cut" in path) == 2


def test_a_server_that_stays_broken_stops_the_job_with_the_reasons(folder, tmp_path):
    rows = "".join(f"http://127.0.0.1:1/{number}.jpg,c0\n" for number in range(20))
    rows += "".join(f"images/c1/{number:03d}.JPEG,c1\n" for number in range(12))
    (tmp_path / "table.csv").write_text(f"path,label\n{rows}")
    with pytest.raises(
        ValueError, match=r"20 of the first 32 images cannot be used, more than max_failures = 0.25"
    ) as no:
        shard(tmp_path / "table.csv", tmp_path / "corpus", fetch=True, fetch_attempts=2)
    assert "20 x could not be fetched: ConnectionError in 2 attempts" in str(no.value)
    corpus = shard(tmp_path / "table.csv", tmp_path / "corpus", fetch=True, fetch_attempts=2, max_failures=0.9)
    assert corpus.num_samples == 12


def test_an_address_that_is_none_is_quarantined_and_does_not_stop_the_job(folder, server, tmp_path):
    good = [f"{server.address.replace('http', 'HTTP')}/{path.relative_to(folder)}" for path in folder.rglob("*.JPEG")]
    bad = {
        "gs://bucket/a.jpg": "gs:// is no address that images are fetched from: http, https and s3 are",
        "http://\u00e9..com/a.jpg": "cannot be fetched: LocationParseError",
        f"http://{'a' * 70}.com/a.jpg": "cannot be fetched: LocationParseError",
        "s3://only-a-bucket": "the address names no object",
    }
    (tmp_path / "table.csv").write_text("".join(["path,label\n", *(f"{line},c0\n" for line in [*good, *bad])]))
    corpus = shard(tmp_path / "table.csv", tmp_path / "corpus", image_kb=1, fetch=True)
    assert {entry["origin"]: entry["reason"] for entry in corpus.quarantined()} == bad
    assert corpus.num_samples == len(good)


def test_what_opens_an_address_is_not_written_down(folder, server, tmp_path, messages):
    host = server.address.removeprefix("http://")
    lines = ["url,label"]
    for number, path in enumerate(sorted(folder.rglob("*.JPEG"))):
        signed = f"?version={number}&X-Amz-Credential=hush1&X-Amz-Signature=hush2" if number % 2 else "?sig=hush3"
        lines.append(f"http://me:hush4@{host}/{path.relative_to(folder)}{signed},{path.parent.name}")
    lines.append(f"http://me:hush4@{host}/missing.jpg?sig=hush3,c0")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    corpus = shard(tmp_path / "table.csv", tmp_path / "corpus", image_kb=1, fetch=True)
    assert corpus.num_samples == 36
    assert {path.partition("?")[2] for path in corpus.origins()} == {"", *(f"version={n}" for n in range(1, 36, 2))}
    assert any("hush2" in path for path in server.asked)
    written = [path.read_bytes() for path in (tmp_path / "corpus").iterdir()]
    assert not any(b"hush" in each for each in [*written, messages().encode()])


def test_addresses_that_differ_in_a_key_alone_are_not_lost_in_silence(folder, server, tmp_path, messages):
    images = sorted(path.relative_to(folder) for path in folder.rglob("*.JPEG"))

    def table(*addresses):
        lines = [f"{server.address}/{address},c{number % 2}" for number, address in enumerate(addresses)]
        (tmp_path / "table.csv").write_text("\n".join(["url,label", *lines]) + "\n")
        return tmp_path / "table.csv"

    first = [f"{images[0]}?key=1", f"{images[0]}?key=2", f"{images[1]}?size=1#hush", f"{images[2]}?size=2"]
    corpus = shard(table(*first), tmp_path / "corpus", image_kb=1, fetch=True)
    assert "1 addresses differ from others only in what is not written down" in messages()
    assert sorted(corpus.origins()) == sorted(
        f"{server.address}/{name}" for name in (images[0], images[0], f"{images[1]}?size=1", f"{images[2]}?size=2")
    )
    again = shard(table(*first, str(images[3])), tmp_path / "corpus", image_kb=1, fetch=True, append=True)
    assert len(again) == 5
    with pytest.raises(SourceError, match="it cannot be told which of them"):
        shard(table(*first, f"{images[0]}?key=3"), tmp_path / "corpus", image_kb=1, fetch=True, append=True)


def test_what_could_not_be_compared_is_left_out_until_an_append(folder, server, tmp_path):
    lines = ["url,label"]
    for number, path in enumerate(sorted(folder.rglob("*.JPEG"))):
        ask = "?throttled" if number == 4 else ""
        lines.append(f"{server.address}/{path.relative_to(folder)}{ask},{path.parent.name}")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    options: dict[str, Any] = {"image_kb": 1, "fetch": True, "fetch_attempts": 2, "dedup": True}
    first = shard(tmp_path / "table.csv", tmp_path / "corpus", **options)
    (left,) = first.quarantined()
    assert left["reason"] == "could not be had when duplicates were looked for"
    assert left["origin"].endswith("?throttled")
    assert first.num_samples == 35
    assert first.manifest["removed"]["images"] == 0
    second = shard(tmp_path / "table.csv", tmp_path / "corpus", append=True, **options)
    assert second.num_samples == 36
    assert left["origin"] in set(second.origins())


def test_too_many_that_are_not_even_there_stop_the_job(folder, tmp_path):
    rows = "".join(f"images/c0/away-{number}.jpg,c0\n" for number in range(36))
    rows += "".join(f"images/{path.relative_to(folder)},c1\n" for path in folder.rglob("*.JPEG"))
    (tmp_path / "table.csv").write_text(f"path,label\n{rows}")
    with pytest.raises(ValueError, match=r"36 of the first 72 images .* max_failures = 0.25 .*36 x named in the table"):
        shard(tmp_path / "table.csv", tmp_path / "corpus")
    assert not list((tmp_path / "corpus").glob("*.tar"))
    assert shard(tmp_path / "table.csv", tmp_path / "corpus", max_failures=0.5).num_samples == 36


def test_tables_of_all_forms_are_the_same(folder, tmp_path):
    """Long and wide, CSV, JSON lines and Parquet, with the columns' usual names and others."""
    images = sorted(folder.rglob("*.JPEG"))
    labels = {
        str(path.relative_to(folder)): [("dog", 1.0), ("cat", 0.25)][: 1 + k % 2] for k, path in enumerate(images)
    }
    long = [(path, name, weight) for path, pairs in labels.items() for name, weight in pairs]
    (tmp_path / "long.csv").write_text(
        "label,weight,path\n" + "".join(f"{name},{weight},{path}\n" for path, name, weight in reversed(long))
    )
    wide = [
        {"path": p, "labels": [n for n, _ in pairs], "weights": [w for _, w in pairs]} for p, pairs in labels.items()
    ]
    (tmp_path / "wide.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wide))
    pq.write_table(pa.Table.from_pylist(wide), tmp_path / "wide.parquet")
    columns = {"where": [p for p, _, _ in long], "what": [n for _, n, _ in long], "how": [w for _, _, w in long]}
    pq.write_table(pa.table(columns), tmp_path / "long.parquet")
    absolute = [{**row, "path": f"{folder}/{row['path']}"} for row in wide]
    (tmp_path / "absolute.jsonl").write_text("".join(json.dumps(row) + "\n" for row in absolute))
    named = {"path_column": "where", "label_column": "what", "weight_column": "how"}
    corpora = [
        shard(folder, tmp_path / "1", labels=tmp_path / "long.csv"),
        shard(folder, tmp_path / "2", labels=tmp_path / "wide.jsonl"),
        shard(folder, tmp_path / "3", labels=tmp_path / "wide.parquet"),
        shard(folder, tmp_path / "4", labels=tmp_path / "long.parquet", **named),
        shard(tmp_path / "absolute.jsonl", tmp_path / "5"),
    ]
    for corpus in corpora:
        assert (corpus.label_kind, corpus.classes) == ("multi", ["cat", "dog"])
        assert tars_of(corpus) == tars_of(corpora[0])
    found = contents(corpora[0])
    assert {path: sorted(pairs) for path, pairs in labels.items()} == {
        path: pairs for path, (_, pairs) in found.items()
    }


def test_a_table_of_one_label_an_image_gives_classes(folder, tmp_path):
    rows = "".join(f"{path.relative_to(folder)},{path.parent.name}\n" for path in sorted(folder.rglob("*.JPEG")))
    (folder / "table.csv").write_text(f"path,label\n{rows}")
    corpus = shard(folder / "table.csv", tmp_path / "corpus")
    (folder / "table.csv").rename(tmp_path / "table.csv")
    assert tars_of(corpus) == tars_of(shard(folder, tmp_path / "expected"))
    many = shard(folder, tmp_path / "many", labels=tmp_path / "table.csv", labels_per_image="many")
    assert many.label_kind == "multi"
    (tmp_path / "table.csv").write_text(f"path,label\n{rows}c0/000.JPEG,c1\n")
    with pytest.raises(ValueError, match=r"labels_per_image = one: .* gives 'c0/000.JPEG' 2 labels"):
        shard(folder, tmp_path / "no", labels=tmp_path / "table.csv", labels_per_image="one")


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_numbers_as_labels_are_the_class_numbers(tmp_path, form):
    folder = image_folder(tmp_path / "images", classes=1, images=13)
    labels = {f"c0/{number:03d}.JPEG": number for number in range(13) if number != 5}
    table = tmp_path / f"table.{form}"
    if form == "csv":
        table.write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in labels.items()))
    elif form == "jsonl":
        table.write_text("".join(json.dumps({"path": p, "label": label}) + "\n" for p, label in labels.items()))
    else:
        pq.write_table(pa.table({"path": list(labels), "label": list(labels.values())}), table)
    corpus = shard(folder, tmp_path / "corpus", labels=table)
    assert corpus.classes == [str(number) for number in range(13)]
    found = {corpus.origin(sample): int(corpus.labels_of([sample])[1][0]) for sample in range(len(corpus))}
    assert found == labels
    names = [f"name-{number}" for number in range(13)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    named = shard(folder, tmp_path / "named", labels=table, classes=tmp_path / "names.txt")
    assert {path: name for path, (_, [(name, _)]) in contents(named).items()} == {
        p: names[n] for p, n in labels.items()
    }
    (tmp_path / "some.txt").write_text("12\n3\n")
    some = shard(folder, tmp_path / "some", labels=table, classes=tmp_path / "some.txt")
    assert (some.classes, some.class_counts) == (["12", "3"], [1, 1])


@pytest.mark.parametrize("labels", [("01", "2"), ("7", "1440764000"), ("3", "x")])  # in the order of the classes
def test_names_that_are_no_class_numbers_stay_names(folder, tmp_path, labels):
    (tmp_path / "table.csv").write_text(f"path,label\nc0/000.JPEG,{labels[0]}\nc1/000.JPEG,{labels[1]}\n")
    assert shard(folder, tmp_path / "corpus", labels=tmp_path / "table.csv").classes == list(labels)


# ------------------------------------------------------------------------------------------ images inside a table


def embedded(folder: Path, target: Path, files: int = 2) -> None:
    """As Hugging Face's datasets write image classification: {"bytes", "path"}, class numbers, their names aside."""
    rows = [
        {"image": {"bytes": path.read_bytes(), "path": path.name}, "label": int(path.parent.name[1:])}
        for path in sorted(folder.rglob("*.JPEG"))
    ]
    features = {"features": {"label": {"names": ["zero", "one", "two"], "_type": "ClassLabel"}}}
    target.mkdir()
    for number in range(files):
        table = pa.Table.from_pylist(rows[number::files])
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": features})})
        pq.write_table(table, target / f"train-{number:05d}-of-{files:05d}.parquet", row_group_size=5)


def test_images_inside_parquet_files_are_sharded(folder, tmp_path, messages):
    embedded(folder, tmp_path / "parquet")
    corpus = shard(tmp_path / "parquet", tmp_path / "corpus")
    assert corpus.classes == ["zero", "one", "two"]
    assert corpus.class_counts == [12, 12, 12]
    expected = {path.read_bytes(): int(path.parent.name[1:]) for path in folder.rglob("*.JPEG")}
    for image, labels in contents(corpus).values():
        assert labels == [(corpus.classes[expected.pop(image)], 1.0)]
    assert not expected
    assert not (tmp_path / "corpus" / "images").exists()
    made = {path.name: path.stat().st_ino for path in corpus.path.iterdir()}
    shard(tmp_path / "parquet", tmp_path / "corpus")
    assert {path.name: path.stat().st_ino for path in corpus.path.iterdir()} == made
    assert "nothing to do" in messages()
    again = shard(tmp_path / "parquet", tmp_path / "again", workers=1)
    assert again.corpus_hash == corpus.corpus_hash
    assert corpus.origin(0).startswith("train-0000")


@pytest.mark.parametrize(
    ("labels", "weights", "message"),
    [
        ([[0], [-1]], None, r"label '-1' of '.*' is negative, and so no class: no_label=-1"),
        ([[0], [7]], None, "are not numbers of the 3 classes it names, for example not '7'"),
        ([["a", ""], ["b"]], None, "label '' of '.*' has no name"),
        ([["a", "a"], ["b"]], None, "label 'a' of '.*' stands twice"),
        ([["a"], ["b"]], [[1.0], [float("nan")]], "label 'b' of '.*' has weight nan: a number not below 0"),
        ([["a"], ["b"]], [[-1.0], [1.0]], "label 'a' of '.*' has weight -1: a number not below 0"),
        ([["a", None], ["b"]], None, "a list of labels has a null in it"),
    ],
)
def test_labels_beside_images_inside_tables_are_checked(folder, tmp_path, labels, weights, message):
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(folder.rglob("*.JPEG"))[:2]]
    table = pa.table({"image": images, "label": labels} | ({"weight": weights} if weights else {}))
    if labels[0] == [0]:
        features = {"features": {"label": {"names": ["zero", "one", "two"], "_type": "ClassLabel"}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": features})})
    pq.write_table(table, tmp_path / "table.parquet")
    with pytest.raises(ValueError, match=message):
        shard(tmp_path / "table.parquet", tmp_path / "corpus", **({"weight_column": "weight"} if weights else {}))


def test_the_mark_that_windows_puts_before_text_is_no_part_of_it(folder, tmp_path):
    rows = "".join(f"{path.relative_to(folder)},{path.parent.name}\n" for path in sorted(folder.rglob("*.JPEG")))
    (folder / "table.csv").write_text(f"path,label\n{rows}", encoding="utf-8-sig")
    (tmp_path / "order.txt").write_text("c2\nc0\nc1\n", encoding="utf-8-sig")
    corpus = shard(folder / "table.csv", tmp_path / "corpus", classes=tmp_path / "order.txt")
    assert (corpus.classes, corpus.class_counts) == (["c2", "c0", "c1"], [12, 12, 12])


def test_a_path_that_is_written_in_several_ways_is_one_image(folder, tmp_path):
    (folder / "table.csv").write_text("path,label\nc0/000.JPEG,a\n./c0/000.JPEG,b\nc0//001.JPEG,a\n")
    corpus = shard(folder / "table.csv", tmp_path / "corpus")
    assert sorted(corpus.origins()) == ["c0/000.JPEG", "c0/001.JPEG"]
    assert [labels for _, labels in sorted(contents(corpus).values(), key=lambda pair: -len(pair[1]))] == [
        [("a", 1.0), ("b", 1.0)], [("a", 1.0)]
    ]  # fmt: skip
    (folder / "table.csv").write_text("path,label\nc0/000.JPEG,a\n./c0/000.JPEG,a\n")
    with pytest.raises(ValueError, match=r"label 'a' of 'c0/000\.JPEG' stands twice"):
        shard(folder / "table.csv", tmp_path / "again")


def test_a_ray_dataset_is_sharded(folder, tmp_path):
    import ray

    from data_prep.shard_dataset import shard_dataset

    rows = [{"jpeg": path.read_bytes(), "what": path.parent.name} for path in sorted(folder.rglob("*.JPEG"))]
    one = shard_dataset(ray.data.from_items(rows), str(tmp_path / "1"), image="jpeg", label="what", shard_mb=0.01)
    other = ray.data.from_items(rows[::-1]).repartition(7)
    two = shard_dataset(other, str(tmp_path / "2"), image="jpeg", label="what", shard_mb=0.01)
    assert one.classes == ["c0", "c1", "c2"]
    assert one.num_samples == 36
    assert tars_of(one) == tars_of(two)
    assert list(verify(one)) == []
    by_label = {(image, labels[0][0]) for image, labels in contents(one).values()}
    assert by_label == {(row["jpeg"], row["what"]) for row in rows}
    with pytest.raises(ValueError, match="label = 'label': the dataset has no such column, it has jpeg, what"):
        shard_dataset(ray.data.from_items(rows), str(tmp_path / "3"), image="jpeg")


def test_a_ray_dataset_with_one_image_under_several_labels_has_one_order(folder, tmp_path):
    import ray

    from data_prep.shard_dataset import shard_dataset

    rows = [
        {"jpeg": path.read_bytes(), "what": label} for path in sorted(folder.rglob("*.JPEG")) for label in ("a", "b")
    ]
    corpora = [
        shard_dataset(
            ray.data.from_items(some).repartition(9), str(tmp_path / str(n)), image="jpeg", label="what", shard_mb=0.01
        )
        for n, some in enumerate((rows, rows[::-1]))
    ]
    assert tars_of(corpora[0]) == tars_of(corpora[1])


# --------------------------------------------------------------------------- corpora and WebDataset tars, anew


def test_a_corpus_is_sharded_anew(folder, tmp_path):
    first = shard(folder, tmp_path / "first", seed=3)
    again = shard(tmp_path / "first", tmp_path / "again", seed=0, shard_mb=0.02)
    assert tars_of(again) == tars_of(shard(folder, tmp_path / "expected", seed=0, shard_mb=0.02))
    assert contents(again) == contents(first)


def test_webdataset_tars_are_sharded_with_other_labels(folder, tmp_path, messages):
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in shard(folder, tmp_path / "first").path.glob("*.tar"):
        (shards / path.name).write_bytes(path.read_bytes())
    (tmp_path / "index.json").write_text(json.dumps({"1": ["n1", "one"], "0": ["n0", "zero"], "2": ["n2", "two"]}))
    named = shard(shards, tmp_path / "named", classes=tmp_path / "index.json")
    assert (named.classes, named.class_descriptions) == (["n0", "n1", "n2"], ["zero", "one", "two"])
    originals = {path.read_bytes(): path.parent.name[1:] for path in folder.rglob("*.JPEG")}
    assert {image: labels[0][0][1:] for image, labels in contents(named).values()} == originals

    (tmp_path / "new.txt").write_text("0\tanimal\n2\tanimal\n")
    merged = shard(f"{shards}/shard-*.tar", tmp_path / "merged", relabel=tmp_path / "new.txt")
    assert (merged.classes, merged.class_counts) == (["1", "animal"], [12, 24])
    (tmp_path / "keep.txt").write_text("animal\tan animal\nnone\n")
    kept = shard(shards, tmp_path / "kept", relabel=tmp_path / "new.txt", classes=tmp_path / "keep.txt")
    assert (kept.classes, kept.class_counts) == (["animal", "none"], [24, 0])
    assert "left out: 12 images of 1 classes that classes =" in messages()
    (tmp_path / "keep.txt").write_text("nothing\n")
    with pytest.raises(ValueError, match=r"no image of .* is of one of its 1 classes"):
        shard(folder, tmp_path / "no", classes=tmp_path / "keep.txt")


# ----------------------------------------------------------------------------------------------- images changed


def test_images_are_converted_only_where_asked(folder, tmp_path):
    from PIL import Image

    whole = shard(folder, tmp_path / "whole")
    (folder / "c0" / "progressive.jpg").write_bytes(encoded(1, (60, 50), progressive=True, quality=90))
    cmyk = io.BytesIO()
    Image.open(io.BytesIO(encoded(2, (64, 48)))).convert("CMYK").save(cmyk, "JPEG")
    (folder / "c1" / "cmyk.jpg").write_bytes(cmyk.getvalue())
    turned = Image.Exif()
    turned[0x0112] = 6
    (folder / "c2" / "large.jpg").write_bytes(encoded(3, (300, 200), exif=turned))
    (folder / "c2" / "grey.jpg").write_bytes(gray := encoded(4, (50, 40)))
    (folder / "c2" / "small.png").write_bytes(encoded(5, (20, 20), "PNG"))

    settings = {"baseline": True, "max_side": 100, "min_side": 25, "jpeg_quality": 90}
    corpus = shard(folder, tmp_path / "corpus", **settings)
    assert corpus.manifest["converted"] == 3
    assert corpus.manifest["settings"] | settings == corpus.manifest["settings"]
    found, before = contents(corpus), contents(whole)
    assert all(found[origin] == before[origin] for origin in before)
    assert found["c2/grey.jpg"][0] == gray
    for origin, size in {"c0/progressive.jpg": (60, 50), "c1/cmyk.jpg": (64, 48), "c2/large.jpg": (67, 100)}.items():
        with Image.open(io.BytesIO(found[origin][0])) as image:
            assert (image.size, image.mode, "progressive" in image.info) == (size, "RGB", False)
            assert not image.getexif()
    sizes = {
        corpus.origin(i): (int(corpus.index["width"][i]), int(corpus.index["height"][i])) for i in range(len(corpus))
    }
    assert sizes["c2/large.jpg"] == (67, 100)
    [small] = corpus.quarantined()
    assert small == {"origin": "c2/small.png", "reason": "left out: a side below min_side=25 pixels"}
    again = shard(folder, tmp_path / "again", workers=1, **settings)
    assert again.corpus_hash == corpus.corpus_hash
    with pytest.raises(ValueError, match="jpeg_quality is not read"):
        shard(folder, tmp_path / "no", jpeg_quality=80)


# ----------------------------------------------------------------------------------------------------- failures


def test_a_job_of_which_too_much_fails_stops_early(tmp_path):
    """Before it has read everything, with the reasons; and goes on where it was when more is allowed."""
    good = encoded(1)
    for number in range(3000):
        path = tmp_path / "images" / f"c{number % 2}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(good + number.to_bytes(4, "big") if number % 20 else b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"of the first [12],\d\d\d images cannot be used, .* x no JPEG, PNG") as stop:
        shard(tmp_path / "images", tmp_path / "corpus", max_failures=0.01, shard_mb=0.1, workers=1)
    assert "max_failures = 0.01" in str(stop.value)
    written = {path.name for path in (tmp_path / "corpus").glob("*.record.json")}
    corpus = shard(tmp_path / "images", tmp_path / "corpus", max_failures=0.06, shard_mb=0.1)
    assert 0 < len(written) < len(corpus.shard_sizes)
    assert corpus.manifest["quarantined"] == 150
