"""What tests/fuzz.py throws mutated files at: for each kind of file, a good one, and all that reads it."""

import gzip
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from PIL import Image

from cluster.folders import Folder, LocalFolder
from cluster.settings import load_recipe, parse_command, resolve
from data_prep import class_names, embedded_images
from data_prep.append import plan_append, what_is_new
from data_prep.convert import Conversion
from data_prep.copy_corpus import CopySettings
from data_prep.corpus import Corpus
from data_prep.corpus_format import MANIFEST, manifest_hash
from data_prep.distributions import measure
from data_prep.image_check import UnusableImage, check_image
from data_prep.index import IndexSettings
from data_prep.index_task import IndexTask, Tar, index_tar
from data_prep.listing import Listing
from data_prep.mixture import Mixture
from data_prep.sample_labels import LabelForm
from data_prep.shard import ShardSettings, check_settings
from data_prep.shard_task import finished_records, read_rows
from data_prep.show import describe
from data_prep.source_settings import SourceSettings
from data_prep.sources import list_source
from data_prep.subset import SubsetSettings, choose
from data_prep.table_files import ColumnNames, class_names_of, columns_of, table_files
from data_prep.table_labels import LabelOptions
from data_prep.tar_sample_source import list_corpus
from data_prep.verify import verify
from models.classifier import load_classifier
from models.vit import VitConfig
from pipeline import checkpoints, layout
from pipeline.config import RECIPES, EvaluateSettings, FinetuneSettings, PretrainSettings
from pipeline.corpora import shuffle_windows
from pipeline.data_config import DataSettings
from pipeline.identity import as_begun
from pipeline.packages import load_package
from pipeline.pretrain import architecture
from tests.corpora import encoded, image_folder
from tests.mutations import any_of, mutate_bytes, mutate_json, mutate_tar, mutate_text

FROZEN = Path(__file__).parent / "frozen"


@dataclass(frozen=True)
class Reader:
    """A kind of files from outside."""

    name: str
    make: Callable[[Path], Any]
    """Good files, in a folder of their own; what it returns is given to each case."""
    case: Callable[[random.Random, Any, Path], object]
    """Change something in a copy, in another folder, and read it: raises an error of ours, or nothing."""


# ---- corpora -------------------------------------------------------------------------------------------------------


def _make_corpora(base: Path) -> tuple[list[Path], Listing]:
    os.environ["VITFORGE_CACHE"] = str(base / "cache")
    images = image_folder(base / "images", classes=2, images=3)
    corpora = [folder.parent for folder in sorted((FROZEN / "corpora").rglob(MANIFEST))]
    return corpora, list_source(SourceSettings(source=str(images)))


def _copied(chance: random.Random, corpora: Sequence[Path], place: Path) -> Path:
    """A copy of one of some corpora, beside those that it shares shards with."""
    chosen = chance.choice(corpora)
    relative = chosen.relative_to(FROZEN / "corpora")
    shutil.copytree(chosen, place / relative)
    shards_at = json.loads((chosen / MANIFEST).read_text()).get("shards_at")
    if shards_at is not None and not (place / relative / shards_at).resolve().exists():
        shutil.copytree((chosen / shards_at).resolve(), (place / relative / shards_at).resolve())
    return place / relative


def _read_corpus(folder: Path, listing: Listing) -> None:
    """All that the commands and training do with a corpus, until the first refusal of each."""
    refusals: list[Exception] = []

    def attempt(action: Callable[[], object]) -> None:
        try:
            action()
        except ValueError as error:
            refusals.append(error)

    attempt(lambda: list_corpus(str(folder)))
    attempt(lambda: _append(folder, listing))
    attempt(lambda: _read_records(folder))
    checks: tuple[Literal["content", "sizes"], ...] = ("content", "sizes")
    for check in checks:
        try:
            corpus = Corpus.open(str(folder), check)
        except ValueError as error:
            refusals.append(error)
            continue
        for action in _uses(corpus):
            attempt(action)
    _raise_worst(refusals)


def _uses(corpus: Corpus) -> list[Callable[[], object]]:
    everything = np.arange(min(len(corpus), 1000))
    mixture = Mixture.of(corpus)
    return [
        lambda: corpus.read(everything),
        lambda: corpus.labels_of(everything),
        lambda: corpus.places_of(everything),
        lambda: list(corpus.origins()),
        lambda: list(corpus.quarantined()),
        lambda: list(verify(corpus)),
        lambda: list(describe(corpus, measure(corpus), 3)),
        lambda: choose(corpus, SubsetSettings(corpus=corpus.url, destination="/nowhere", holdout=2)),
        lambda: (mixture.labels_of(everything), mixture.image_sizes(everything), mixture.describe(0)),
        lambda: shuffle_windows(mixture, DataSettings(corpus=corpus.url)),
    ]


def _raise_worst(refusals: list[Exception]) -> None:
    """The refusal that is none of ours, if one is; else any."""
    from tests.fuzz import REFUSALS

    for error in sorted(refusals, key=lambda error: isinstance(error, REFUSALS)):
        raise error


def _append(folder: Path, listing: Listing) -> None:
    there = LocalFolder(folder)
    new, before = what_is_new(listing, there, Conversion())
    if len(new):
        plan_append(new, before, there, 10_000, 0, Conversion(), "append")


def _read_records(folder: Path) -> None:
    there: Folder = LocalFolder(folder)
    names = [path.name for path in folder.glob("*.tar")]
    plan = json.loads((FROZEN / "corpora" / "single" / "plan.json").read_text())["plan_hash"]
    for name in finished_records(there, names, plan):
        read_rows(there, name)


def _manifest(chance: random.Random, made: tuple[list[Path], Listing], place: Path) -> None:
    folder = _copied(chance, made[0], place)
    path = folder / MANIFEST
    value = mutate_json(chance, json.loads(path.read_text()))
    if isinstance(value, dict) and chance.random() < 0.9:
        with suppress(ValueError, RecursionError):
            value["corpus_hash"] = manifest_hash(value)
    content = json.dumps(value).encode()
    path.write_bytes(mutate_text(chance, content) if chance.random() < 0.1 else content)
    _read_corpus(folder, made[1])


def _index(chance: random.Random, made: tuple[list[Path], Listing], place: Path) -> None:
    folder = _copied(chance, made[0], place)
    manifest = json.loads((folder / MANIFEST).read_text())
    beside = [path.name for path in folder.iterdir() if path.suffix in (".npz", ".origins", ".json", ".idx", ".jsonl")]
    names = sorted(manifest["files"]) * 3 + sorted(beside)
    for name in chance.sample(names, chance.choice((1, 1, 2))):
        path = folder / name
        if name == MANIFEST or not path.exists():
            continue
        content = path.read_bytes()
        if name.endswith((".json", ".jsonl")) and content.strip() and chance.random() < 0.7:
            lines = content.splitlines() if name.endswith("l") else [content]
            lines[0] = json.dumps(mutate_json(chance, json.loads(lines[0]))).encode()
            content = b"\n".join(lines) + b"\n"
        else:
            content = (mutate_bytes if name.endswith((".bin", ".ptr", ".npz")) else mutate_text)(chance, content)
        path.write_bytes(content)
        if name in manifest["files"]:
            manifest["files"][name] = {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
        for shard in manifest["shards"]:
            if name == shard["name"].replace(".tar", ".origins"):
                shard["origins_xxh3_128"] = xxhash.xxh3_128_hexdigest(content)
    manifest["corpus_hash"] = manifest_hash(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    _read_corpus(folder, made[1])


# ---- sources -------------------------------------------------------------------------------------------------------


def _make_tars(base: Path) -> dict[str, Any]:
    os.environ["VITFORGE_CACHE"] = str(base / "cache")
    image, label = encoded(1), json.dumps({"labels": [0, 1], "weights": [1, 0.5]}).encode()
    samples = [member for n in range(4) for member in ((f"{n}.jpg", image), (f"{n}.cls", b"1"))]
    many = [member for n in range(4) for member in ((f"{n}.jpg", image), (f"{n}.json", label))]
    return {
        "samples": samples, "many": many, "label": json.loads(label),
        "folders": [(f"train/c{n % 2}/{n}.jpg", image) for n in range(5)],
    }  # fmt: skip


def _tar(chance: random.Random, made: dict[str, Any], place: Path) -> None:
    kind = chance.choice(("samples", "many", "folders", "classes"))
    if kind == "many":
        members = [
            (name, json.dumps(mutate_json(chance, made["label"])).encode() if name.endswith(".json") else content)
            for name, content in made["many"]
        ]
        content = mutate_tar(chance, members)
    elif kind == "classes":
        inner = [mutate_tar(chance, made["folders"]) for _ in range(2)]
        zipped = [gzip.compress(tar) if chance.random() < 0.5 else tar for tar in inner]
        content = mutate_tar(chance, [(f"n{n}.tar{chance.choice(('', '.gz'))}", tar) for n, tar in enumerate(zipped)])
    else:
        content = mutate_tar(chance, made[kind])
    if chance.random() < 0.2:
        content = mutate_bytes(chance, gzip.compress(content))
    name = chance.choice(("x.tar", "x.tar", "x.tar.gz"))
    (place / name).write_bytes(content)
    refusals: list[Exception] = []
    for action in (
        lambda: _read_listing(list_source(SourceSettings(source=str(place / name)))),
        lambda: _index_tar(place, name),
    ):
        try:
            action()
        except ValueError as error:
            refusals.append(error)
    _raise_worst(refusals)


def _read_listing(listing: Listing) -> None:
    for group in listing.images.groups(listing.names, listing.sizes):
        for image in group:
            if isinstance(image, memoryview):
                with suppress(ValueError):
                    check_image(image)


def _index_tar(place: Path, name: str) -> None:
    source = LocalFolder(place)
    for form in (LabelForm("cls"), LabelForm("json", many=True), LabelForm("json", names=("l0",))):
        tar = Tar(source, name, (place / name).stat().st_size)
        index_tar(IndexTask(LocalFolder(place / "corpus"), tar, "plan", form, None, True))
        read_rows(LocalFolder(place / "corpus"), name)


def _make_tables(base: Path) -> Path:
    images = image_folder(base / "images", classes=2, images=3)
    rows = [{"path": f"c{n % 2}/00{n % 3}.JPEG", "label": f"l{n % 2}", "weight": 0.5} for n in range(6)]
    (base / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (base / "t.csv").write_text(
        "path,label,weight\n" + "".join(f"{r['path']},{r['label']},{r['weight']}\n" for r in rows)
    )
    (base / "t.json").write_text(json.dumps(rows))
    hot = [f"{row['path']}, {n % 2}, {1 - n % 2}" for n, row in enumerate(rows)]
    (base / "hot.csv").write_text("\n".join(["filename, a, b", *hot]))
    (base / "cells.csv.gz").write_bytes(
        gzip.compress(
            "".join(["path\tlabel\n", *(f"{r['path']}\t['{r['label']}', \"x\", 3]\n" for r in rows)]).encode()
        )
    )
    coco = {
        "images": [{"id": n, "file_name": f"c{n % 2}/00{n % 3}.JPEG"} for n in range(6)],
        "annotations": [{"image_id": n, "category_id": n % 2 + 1} for n in range(6)],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b", "supercategory": "c"}],
    }
    (base / "coco.json").write_text(json.dumps(coco))
    (base / "classes.json").write_text(json.dumps({"0": ["l0", "a"], "1": ["l1", "b"]}))
    (base / "classes.txt").write_text("l0\ta\nl1\tb\n")
    return images.parent


def _odd_column(chance: random.Random, count: int) -> pa.Array:
    values: Any = chance.choice(
        (
            [None] * count, [1] * count, [-1] * count, [2**63 - 1] * count, [0.5] * count, [float("nan")] * count,
            [[1, 2]] * count, [[]] * count, [None, ["a"]] * (count // 2), ["x"] * count, [b"x"] * count,
            [b""] * count,
            [{"bytes": encoded(1), "path": "a"}] * count, [{"bytes": None, "path": None}] * count,
            [{"a": 1}] * count, [True] * count,
            [[[1]]] * count, ["../x"] * count, ["/etc/passwd"] * count, ["a\0b"] * count, ["x" * 5000] * count,
            ["http://["] * count,
        )
    )  # fmt: skip
    return pa.array(values)


def _table(chance: random.Random, base: Path, place: Path) -> None:
    kind = chance.choice(
        ("t.csv", "t.jsonl", "t.json", "coco.json", "hot.csv", "cells.csv.gz", "t.parquet", "images.parquet", "classes")
    )
    settings: dict[str, Any] = {"source": str(base / "images"), "labels": str(place / kind)}
    if kind == "classes":
        name = chance.choice(("classes.json", "classes.txt"))
        content = (base / name).read_bytes()
        if name == "classes.json" and chance.random() < 0.6:
            content = json.dumps(mutate_json(chance, json.loads(content))).encode()
        else:
            content = mutate_text(chance, content)
        path = place / name
        path.write_bytes(content)
        read: Any = chance.choice((class_names.read_classes, lambda path: class_names.read_words(path, ["l0", "l1"])))
        read(path)
        return
    if kind == "t.jsonl":
        lines = (base / kind).read_text().splitlines()
        lines[chance.randrange(6)] = json.dumps(mutate_json(chance, json.loads(lines[0])))
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
        content = mutate_text(chance, content) if chance.random() < 0.3 else content
    elif kind in ("t.json", "coco.json") and chance.random() < 0.7:
        content = json.dumps(mutate_json(chance, json.loads((base / kind).read_bytes()))).encode()
    elif kind in ("t.csv", "t.json", "coco.json", "hot.csv"):
        content = mutate_text(chance, (base / kind).read_bytes())
    elif kind == "cells.csv.gz":
        content = gzip.compress(mutate_text(chance, gzip.decompress((base / kind).read_bytes())))
        content = mutate_bytes(chance, content) if chance.random() < 0.2 else content
        settings["label_delimiter"] = chance.choice(("list", "space", ","))
    else:
        columns: dict[str, Any] = {
            "path": pa.array([f"c{n % 2}/00{n % 3}.JPEG" for n in range(6)]), "label": pa.array([0, 1] * 3),
            "weight": pa.array([1.0] * 6),
        }  # fmt: skip
        if kind == "images.parquet":
            columns["image"] = columns.pop("path") if chance.random() < 0.1 else pa.array([encoded(1)] * 6)
        for name in chance.sample(sorted(columns), chance.choice((0, 1, 2))):
            columns[name] = _odd_column(chance, 6)
        features = {"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}
        metadata = json.dumps(mutate_json(chance, features)).encode() if chance.random() < 0.3 else b"{}"
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns).replace_schema_metadata({b"huggingface": metadata}), buffer)
        content = buffer.getvalue()
        content = mutate_bytes(chance, content) if chance.random() < 0.5 else content
    (place / kind).write_bytes(content)
    if kind == "images.parquet":
        _read_embedded(place, kind)
    else:
        list_source(SourceSettings(**settings))


def _read_embedded(place: Path, name: str) -> None:
    """As sharding does, in this process."""
    files = table_files(LocalFolder(place), name)
    columns = columns_of(files, ColumnNames())
    if columns.image is None:
        return
    laid_down = LocalFolder(place / "laid")
    embedded_images._lay_down_file(embedded_images._FileTask(files[0], laid_down, "000000", columns, "stamp"))
    names = class_names_of(files[0], columns)
    listing = embedded_images.list_laid_down(laid_down, ["000000"], str(place), columns, names, LabelOptions())
    _read_listing(listing)


# ---- models and runs -----------------------------------------------------------------------------------------------


def _package(chance: random.Random, made: Path, place: Path) -> None:
    folder = shutil.copytree(FROZEN / "package", place / "package")
    description, weights = folder / "artifacts" / "model.json", folder / "artifacts" / "weights.safetensors"
    content = weights.read_bytes()
    length = int.from_bytes(content[:8], "little")
    what = chance.randrange(4)
    if what <= 1:
        text = json.dumps(mutate_json(chance, json.loads(description.read_text()))).encode()
        description.write_bytes(mutate_text(chance, text) if chance.random() < 0.1 else text)
    elif what == 2:
        header = json.dumps(mutate_json(chance, json.loads(content[8 : 8 + length]))).encode()
        weights.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    else:
        weights.write_bytes(mutate_bytes(chance, content[: 8 + length]) + content[8 + length :])
    chance.choice((load_package, load_classifier))(str(folder))


def _checkpoint(chance: random.Random, made: Path, place: Path) -> None:
    run = FROZEN / "runs" / chance.choice(("softmax", "sigmoid", "finetune"))
    folder = shutil.copytree(run / "checkpoints", place / "checkpoints")
    (checkpoint,) = folder.iterdir()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    before = json.loads(json.dumps(manifest["state"]))
    if chance.random() < 0.5:
        listing = checkpoint / "rank-00000.json"
        content = json.dumps(mutate_json(chance, json.loads(listing.read_text()))).encode()
        content = mutate_text(chance, content) if chance.random() < 0.1 else content
        listing.write_bytes(content)
        manifest["parts"][0]["digest"] = xxhash.xxh3_128_hexdigest(content)
        manifest["parts"][0]["files"]["rank-00000.json"] = len(content)
    else:
        manifest = mutate_json(chance, manifest)
    if isinstance(manifest, dict):
        with suppress(ValueError, RecursionError):
            manifest["digest"] = checkpoints._digest(manifest)
    content = json.dumps(manifest).encode()
    (checkpoint / "manifest.json").write_bytes(mutate_text(chance, content) if chance.random() < 0.1 else content)
    found = checkpoints.newest(LocalFolder(folder), verify_from=chance.choice((0, None)))
    assert found is not None
    kind = FinetuneSettings if run.name == "finetune" else PretrainSettings
    settings = resolve(kind, {**before["resolved_settings"]})
    expected = {**before, "architecture": VitConfig.from_json(before["architecture"]).to_json()}
    refusals: list[Exception] = []
    for action in (
        lambda: as_begun(settings, found.state),
        lambda: checkpoints.check_resumable(found, expected, kind, allow_changes=chance.random() < 0.5),
        lambda: checkpoints.full_weights(found),
    ):
        try:
            action()
        except ValueError as error:
            refusals.append(error)
    _raise_worst(refusals)


# ---- settings ------------------------------------------------------------------------------------------------------

_COMMANDS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (ShardSettings, ("source", "destination")), (CopySettings, ("source", "destination")), (IndexSettings,
    ("source", "destination")),
    (SubsetSettings, ("corpus", "destination")), (EvaluateSettings, ("model", "corpus")),
)  # fmt: skip
_VALUES = (
    "", "null", "true", "-1", "0", "1", "1.5", "1e999", ".nan", ".inf", "-.inf", str(10**9), str(10**18),
    str(10**30), "9" * 5000,
    "[" * 50_000, "{" * 2000, "[[[[1]]]]", "{a: {b: {c: 1}}}", "&a [*a, *a]", "*a", "!!python/object:os.system x",
    "!!binary aGk=",
    "!!set {a}", "2020-01-01", "? a", "? [a]: b", "'", '"', "%", "@x", "`", "- 1", "a: b: c", "\0", "\x1b[2J",
    "\udcff", "x" * 100_000,
    "1" * 99_999 + "x", "1_" * 5000, "1:2:3", "0:" * 5000 + "0", "0x" + "f" * 5000, "90 epochs", "1e400 steps",
    "9" * 400 + " epochs",
    "4-16", "1-99999999", "../x", "s3://", "http://[::1", "~nobody/x", "/dev/zero", "[1, 2", "]", "<<: 1",
    "[0.1, 0.2]", "auto", "S/16",
)  # fmt: skip


def _make_keys(base: Path) -> dict[Any, list[str]]:
    from cluster.settings import iterate_keys

    kinds = [PretrainSettings, FinetuneSettings, *(kind for kind, _ in _COMMANDS)]
    return {kind: [key for key, _ in iterate_keys(kind)] for kind in kinds}


def _settings(chance: random.Random, keys: dict[Any, list[str]], place: Path) -> None:
    def override(kind: Any) -> str:
        key = chance.choice(keys[kind])
        if chance.random() < 0.1:
            key = chance.choice((key + "x", "a." * 5000 + "a", "", key.split(".")[0], key + ".x", "é", "a" * 50_000))
        return f"{key}={chance.choice(_VALUES)}"

    what = chance.randrange(3)
    if what == 0:
        kind, positionals = chance.choice(_COMMANDS)
        words = [chance.choice(("x", "/x", "s3://a/b", "\0", "x" * 5000)) for _ in positionals]
        words += [override(kind) for _ in range(chance.choice((1, 2)))]
        settings = parse_command(kind, prog="x", description="", positionals=positionals, argv=words)
        if isinstance(settings, ShardSettings):
            check_settings(settings)
        return
    stage, kind = chance.choice((("pretrain", PretrainSettings), ("finetune", FinetuneSettings)))
    recipe = chance.choice(sorted((RECIPES / stage).glob("*.yaml")))
    overrides = [override(kind) for _ in range(chance.choice((1, 1, 2, 3)))]
    if what == 1:
        text = recipe.read_bytes()
        lines = text.splitlines()
        line = chance.randrange(len(lines))
        changed = lines[line].split(b":")[0] + b": " + chance.choice(_VALUES).encode("utf-8", "surrogateescape")
        bomb = b"a0: &a0 [x]\n" + b"".join(
            b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 12)
        )
        merges = b"a0: &a0 {x: 1}\n" + b"".join(
            b"a%d: &a%d {<<: [%s]}\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 12)
        )
        deep = b"".join(b" " * n + b"- a:\n" for n in range(2000))
        text = any_of(
            chance,
            (4, lambda: b"\n".join([*lines[:line], changed, *lines[line + 1 :]])),
            (3, lambda: mutate_text(chance, text)),
            (1, lambda: mutate_bytes(chance, text)),
            (1, lambda: text + b"\n" + chance.choice((bomb, merges, deep, b"? " * 5000 + b"a", b"k: 1\n" * 50_000))),
        )
        recipe = place / "recipe.yaml"
        recipe.write_bytes(text)
        overrides = overrides[:1] if chance.random() < 0.3 else []
    settings = resolve(kind, load_recipe(recipe), overrides, str(recipe))
    if isinstance(settings, PretrainSettings):
        architecture(settings, num_classes=2)
    training = settings.training
    layout.check_batch(
        training.global_batch, training.micro_batch, chance.choice((1, 2, 8)), settings.data.augment.mixes
    )


# ---- images --------------------------------------------------------------------------------------------------------


def _make_images(base: Path) -> list[bytes]:
    formats: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("JPEG", "RGB", {}), ("JPEG", "L", {}), ("JPEG", "CMYK", {}), ("JPEG", "RGB", {"progressive": True}),
        ("PNG", "RGB", {}),
        ("PNG", "P", {}), ("PNG", "RGBA", {}), ("PNG", "I;16", {}), ("WEBP", "RGB", {"lossless": True}), ("WEBP",
        "RGBA", {}),
        ("BMP", "RGB", {}), ("BMP", "P", {}), ("TIFF", "RGB", {}), ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", "L", {"compression": "tiff_adobe_deflate"}),
    )  # fmt: skip
    made = []
    for number, (kind, mode, options) in enumerate(formats):
        image = Image.open(io.BytesIO(encoded(number))).convert("L" if mode == "I;16" else mode)
        exif = Image.Exif()
        exif[0x0112] = 6
        buffer = io.BytesIO()
        with_exif = {} if kind == "BMP" else {"exif": exif}
        (image.convert("I;16") if mode == "I;16" else image).save(buffer, kind, **with_exif, **options)
        made.append(buffer.getvalue())
    for content in made:  # decoders start once
        with suppress(UnusableImage):
            check_image(content)
    return made


def _images(chance: random.Random, made: list[bytes], place: Path) -> None:
    check_image(mutate_bytes(chance, chance.choice(made)))


READERS = {
    reader.name: reader
    for reader in (
        Reader("manifest", _make_corpora, _manifest),
        Reader("index", _make_corpora, _index),
        Reader("tar", _make_tars, _tar),
        Reader("table", _make_tables, _table),
        Reader("package", lambda base: base, _package),
        Reader("checkpoint", lambda base: base, _checkpoint),
        Reader("settings", _make_keys, _settings),
        Reader("images", _make_images, _images),
    )
}
