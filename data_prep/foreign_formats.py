"""Names data sets in formats that are not read for what they are, with the way to convert them."""

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.folders import Folder
from cluster.paths import shown
from data_prep.listing import SourceError, is_junk
from data_prep.source_tree import FolderTree, SourceTree, is_image_name

_AS_SHARDS = (
    "write each image's bytes and class number as KEY.jpg and KEY.cls into tars (webdataset.ShardWriter), or the "
    "images as files into a folder for each class"
)
_LOOKED_AT = 8
"""Sub-folders."""


@dataclass(frozen=True)
class ForeignFormat:
    """A format that is not read."""

    name: str
    files: re.Pattern[str]
    """Names of its files, which nothing else has."""
    way: str
    """What to do; {path} is where it lies, quoted for Python, {shell} for a shell."""
    one_file: bool
    """Whether a file is opened, and not the folder of several."""


def _format(name: str, files: str, way: str, *, one_file: bool = False) -> ForeignFormat:
    return ForeignFormat(name, re.compile(files, re.IGNORECASE), way, one_file)


_FORMATS = (
    _format(
        "TFRecord files (TensorFlow)",
        r"tfrecord|\.tfrec$|^(train|validation|test|val)-\d{5}-of-\d{5}$",
        f"read them with tf.data.TFRecordDataset or tensorflow_datasets and {_AS_SHARDS}",
    ),
    _format("an FFCV file", r"\.beton$", f"read it with ffcv.loader.Loader and {_AS_SHARDS}", one_file=True),
    _format(
        "MosaicML's MDS", r"\.mds(\.\w+)?$", f"read it with streaming.StreamingDataset(local={{path}}) and {_AS_SHARDS}"
    ),
    _format(
        "litData's chunks",
        r"^chunk-\d+-\d+(\.\w+)?\.bin$",
        f"read it with litdata.StreamingDataset({{path}}) and {_AS_SHARDS}",
    ),
    _format(
        "a Lance data set",
        r"\.lance$|^_versions$",
        "write it as Parquet, which is read: pyarrow.parquet.write_table(lance.dataset({path}).to_table(), "
        "'train.parquet')",
    ),
    _format("an LMDB database", r"^(data|lock)\.mdb$|\.lmdb$", f"read it with lmdb.open({{path}}) and {_AS_SHARDS}"),
    _format(
        "a dict of data sets that Hugging Face's save_to_disk wrote",
        r"^dataset_dict\.json$",
        "write one as Parquet, which is read: datasets.load_from_disk({path})['train'].to_parquet('train.parquet')",
    ),
    _format(
        "a data set that Hugging Face's save_to_disk wrote",
        r"^state\.json$",
        "write it as Parquet, which is read: datasets.load_from_disk({path}).to_parquet('train.parquet')",
    ),
    _format(
        "an Arrow file",
        r"\.feather$",
        "write it as Parquet, which is read: pyarrow.parquet.write_table(pyarrow.feather.read_table({path}), "
        "'train.parquet')",
        one_file=True,
    ),
    _format(
        "a stream of Arrow",
        r"\.arrow$",
        "write it as Parquet, which is read: datasets.Dataset.from_file({path}).to_parquet('train.parquet')",
        one_file=True,
    ),
    _format("an HDF5 file", r"\.(h5|hdf5?|he5)$", f"read it with h5py.File({{path}}) and {_AS_SHARDS}", one_file=True),
    _format(
        "CIFAR as pickles",
        r"^(data_batch_\d|test_batch|batches\.meta|cifar-100-python)(\.bin|\.txt)?$",
        "read it with torchvision.datasets.CIFAR10 (or CIFAR100) and save its images as PNG into a folder for each "
        "class",
    ),
    _format(
        "MNIST's idx files",
        r"idx\d-ubyte(\.gz)?$",
        "read it with torchvision.datasets.MNIST and save its images as PNG into a folder for each class",
    ),
    _format("an MXNet RecordIO file", r"\.rec$", f"read it with mxnet.recordio and {_AS_SHARDS}", one_file=True),
    _format(
        "NumPy arrays", r"\.np[yz]$", f"they hold pixels: save these as PNG (Pillow) and {_AS_SHARDS}", one_file=True
    ),
    _format("a MATLAB file", r"\.mat$", f"read it with scipy.io.loadmat or h5py and {_AS_SHARDS}", one_file=True),
    _format(
        "a pickle",
        r"\.(pkl|pickle|pt|pth|joblib)$",
        f"whoever trusts it may load it in Python and {_AS_SHARDS}",
        one_file=True,
    ),
    _format("an SQLite database", r"\.(sqlite3?|db)$", f"read it with sqlite3 and {_AS_SHARDS}", one_file=True),
    _format("a zip archive", r"\.zip$", "unpack it and give the folder: unzip {shell} -d FOLDER", one_file=True),
    _format("an archive", r"\.(7z|rar)$", "unpack it and give the folder: 7z x {shell} -oFOLDER", one_file=True),
)

_MAGIC = (
    (b"PK\x03\x04", "a zip archive"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"ARROW1", "an Arrow file"),
    (b"\x93NUMPY", "NumPy arrays"),
    (b"SQLite format 3", "an SQLite database"),
    (b"7z\xbc\xaf\x27\x1c", "an archive"),
    (b"Rar!", "an archive"),
)


def refuse_placeholder(folder: Folder, name: str) -> None:
    """Refuse what lies where a tar or table should: a pointer of Git LFS, or the web page of a download that failed.

    Raises:
        SourceError: it is one.
    """
    size = folder.size(name)
    beginning = folder.read_bytes(name, 0, min(size, 64)).lstrip().lower() if size else b""
    if beginning.startswith(b"version https://git-lfs"):
        raise SourceError(
            f"{folder.url}/{name} is a pointer of Git LFS, and the file itself is not here: get it with `git lfs pull` "
            f"in the clone, or with `hf download`"
        )
    if beginning.startswith((b"<!doctype html", b"<html")):
        raise SourceError(f"{folder.url}/{name} is a web page: the download failed, or asked for a login")


def refuse_foreign_file(folder: Folder, name: str) -> None:
    """Refuse a file of a format that is not read.

    Raises:
        SourceError: it is one.
    """
    found = None
    if size := folder.size(name):  # the content first: .arrow may be a file or a stream
        beginning = folder.read_bytes(name, 0, min(size, 16))
        known = next((kind for magic, kind in _MAGIC if beginning.startswith(magic)), None)
        found = next((each for each in _FORMATS if each.name == known), None)
    found = found or foreign_format([name])
    if found is not None:
        raise _refusal(f"{folder.url}/{name}", found, f"{folder.url}/{name}")


def refuse_foreign_folder(tree: FolderTree, below: Sequence[str], images: Sequence[str]) -> None:
    """Refuse a folder that holds, directly or a level below, a format that is not read, and no image.

    Args:
        below: the names of its folders.
        images: of its images.

    Raises:
        SourceError: it does.
    """
    if images or any(tree.images(name) for name in below[:_LOOKED_AT]):
        return
    refuse_foreign_tree(tree, tree.folder.url, below)


def refuse_foreign_tree(tree: SourceTree, place: str, below: Sequence[str]) -> None:
    """As `refuse_foreign_folder`, where it is known that there is no image."""
    for name in ("", *below[:_LOOKED_AT]):
        files = [each for each in tree.files(name) if not is_image_name(each)]
        inside = f"{place}/{name}" if name else place
        found = foreign_format([*files, *tree.folders(name), *([name] if name else [])])
        if found is None:
            continue
        example = next((each for each in files if found.files.search(each)), None)
        raise _refusal(place, found, f"{inside}/{example}" if found.one_file and example else inside, example)


def foreign_format(names: Sequence[str]) -> ForeignFormat | None:
    """The format that some files' names are of, or None."""
    visible = [name for name in names if not is_junk(os.fsencode(name))]
    return next((each for each in _FORMATS if any(each.files.search(name) for name in visible)), None)


def _refusal(place: str, found: ForeignFormat, path: str, example: str | None = None) -> SourceError:
    way = found.way.format(path=repr(path), shell=shlex.quote(path))
    seen = f" ({shown(example)})" if example else ""
    return SourceError(f"source {place} is {found.name}{seen}, which is not read: {way}")
