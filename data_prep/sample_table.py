"""The table of a corpus's samples: one Parquet file for DuckDB, pandas, polars and whatever else reads such tables.

A row is a sample, in the order of the ids:

    key          of its members in the tar, webdataset's __key__
    shard        name of its tar
    label        number of its class; with many labels an image `labels`, a list, and `weights`
    class        name of that class; with many labels `classes`, a list
    description  what people call the class, where the corpus knows; with many labels `descriptions`
    width        pixels, upright
    height       pixels, upright
    origin       where the image came from
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.ahead import ahead
from cluster.folders import Folder, at_hand
from cluster.storage import StorageError
from data_prep.corpus import Corpus
from data_prep.corpus_format import CorpusError, needs_own_shards, write_again
from data_prep.origin_lines import name_of_line
from data_prep.shard_task import shard_file
from data_prep.webdataset_tars import split_name

TABLE = "samples.parquet"
_OURS = b"vitforge"
"""Key of the file's metadata under which it says what it is of."""
_ROWS = 1 << 17
"""Of a row group: what is in memory at a time."""
_THREADS = 8
"""That read the files beside the shards."""


@dataclass
class Members:
    """What the members of a corpus's tars are called, as far as they are samples."""

    images: Counter[str] = field(default_factory=Counter)
    """How many images have each ending."""
    labels: Counter[str] = field(default_factory=Counter)
    """How many labels have each ending."""
    of_others: bool = False
    """Whether the tars were written by others, and may have more members."""

    def to_json(self) -> dict[str, Any]:
        """The most frequent endings first."""
        return {
            "images": dict(sorted(self.images.items(), key=lambda item: (-item[1], item[0]))),
            "labels": dict(sorted(self.labels.items(), key=lambda item: (-item[1], item[0]))),
            "of_others": self.of_others,
        }

    @classmethod
    def of_json(cls, value: Any) -> "Members":
        """What `to_json` gave.

        Raises:
            ValueError: it is no such thing.
        """
        try:
            return cls(Counter(value["images"]), Counter(value["labels"]), bool(value["of_others"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no endings of members: {value!r:.80}") from error


@dataclass(frozen=True)
class TableFacts:
    """What a table says of itself."""

    manifest_hash: str
    """Of the manifest of the corpus whose samples it has."""
    members: Members


def write_table(corpus: Corpus) -> Members:
    """Write the table of a corpus into its folder; returns what the members of its tars are called.

    The same corpus gives the same bytes under the same version of pyarrow.

    Raises:
        CorpusError: the files beside the shards are missing or damaged.
        StorageError: the folder cannot be written.
    """
    members = Members()
    with corpus.folder.building(TABLE) as file:
        writer = pq.ParquetWriter(file, _schema(corpus), compression="zstd")
        for table in _tables(corpus, members):
            writer.write_table(table, row_group_size=_ROWS)
        about = {"manifest_hash": corpus.manifest["corpus_hash"], "members": members.to_json()}
        writer.add_key_value_metadata({_OURS.decode(): json.dumps(about)})
        writer.close()
    return members


def read_facts(folder: Folder) -> TableFacts | None:
    """What the table in a folder is of; None where there is none, or none of ours."""
    if folder.size(TABLE) is None:
        return None
    try:
        with folder.open(TABLE) as file:
            about = json.loads((pq.read_metadata(file).metadata or {})[_OURS])
            return TableFacts(str(about["manifest_hash"]), Members.of_json(about["members"]))
    except StorageError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        return None


def check_table(corpus: Corpus) -> Iterator[str]:
    """What is wrong with the table beside a corpus: one line a problem."""
    place = f"{corpus}/{TABLE}"
    with at_hand(corpus.folder, TABLE) as path, path.open("rb") as file:
        try:
            there = pq.ParquetFile(file)
            if there.metadata.num_rows != len(corpus):
                yield f"{place} has {there.metadata.num_rows:,} rows, the corpus {len(corpus):,} samples"
                return
            for number, table in enumerate(_tables(corpus, Members())):
                if not there.read_row_group(number).replace_schema_metadata(None).equals(table):
                    first = number * _ROWS
                    yield f"{place} is not of this corpus: samples {first:,} to {first + len(table) - 1:,} differ"
        except CorpusError as error:  # of the files beside the shards, which verify.py looks at where they are its own
            if needs_own_shards(corpus.manifest):
                yield str(error)
        except (pa.ArrowException, OSError, IndexError) as error:
            yield f"{place} is damaged: {str(error).splitlines()[0]}"


def _schema(corpus: Corpus) -> pa.Schema:
    one = [("label", pa.int32()), ("class", pa.string())]
    many = [("labels", pa.list_(pa.int32())), ("weights", pa.list_(pa.float32())), ("classes", pa.list_(pa.string()))]
    labels = one if corpus.label_kind == "single" else many
    if corpus.class_descriptions is not None:
        name, kind = labels[-1]
        labels.append(({"class": "description", "classes": "descriptions"}[name], kind))
    sides = [("width", pa.uint16()), ("height", pa.uint16())]
    return pa.schema([("key", pa.string()), ("shard", pa.string()), *labels, *sides, ("origin", pa.string())])


def _tables(corpus: Corpus, members: Members) -> Iterator[pa.Table]:
    """The rows, _ROWS at a time, while it is noted what the members are called."""
    members.of_others = True
    waiting: list[pa.Table] = []
    count = 0
    shards = range(len(corpus.shard_sizes))
    first = 0
    for shard, (lines, origins) in enumerate(ahead(lambda shard: _beside(corpus, shard), shards, _THREADS, _THREADS)):
        waiting.append(_of_shard(corpus, shard, first, lines, origins, members))
        first += corpus.shard_sizes[shard]
        count += len(waiting[-1])
        while count >= _ROWS:
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, _ROWS).combine_chunks()
            waiting, count = [whole.slice(_ROWS)], count - _ROWS
    if count:
        yield pa.concat_tables(waiting).combine_chunks()


def _beside(corpus: Corpus, shard: int) -> tuple[list[bytes], list[str]]:
    """The lines of DALI's index and the origins of all samples in a shard's tar."""
    facts = corpus.manifest["shards"][shard]
    name = shard_file(facts["name"], ".idx")
    try:
        lines = corpus.shards_folder.read_bytes(name).splitlines()[1:]
    except StorageError as error:
        raise CorpusError(f"{error}. {write_again(facts['name'])}") from error
    expected = facts.get("samples_there", facts["samples"])
    if len(lines) != expected or any(len(line.split()) < 4 for line in lines):
        raise CorpusError(
            f"{corpus.shards_folder}/{name} is not the index of its tar: it has {len(lines)} lines for {expected} "
            f"samples, or cut ones. {write_again(facts['name'])}"
        )
    return lines, corpus.read_origins(shard)


def _of_shard(
    corpus: Corpus, shard: int, first: int, lines: list[bytes], origins: list[str], members: Members
) -> pa.Table:
    ids = np.arange(first, first + corpus.shard_sizes[shard])
    places = corpus.places_of(ids).tolist()
    tar = corpus.manifest["shards"][shard]["name"]
    prefix = tar.encode("utf-8", "surrogateescape") + b"/"
    keys = []
    for place in places:
        words = lines[place].split()
        name, origin = words[3], name_of_line(origins[place])
        own = origin.removeprefix(prefix)
        # the index of a tar of others has "_" where a name has white space
        if own != origin and re.sub(rb"\s", b"_", own) == name:
            name = own
        else:
            members.of_others = False
        keys.append(split_name(name)[0].decode("utf-8", "backslashreplace"))
        members.images[words[0].decode("utf-8", "backslashreplace")] += 1
        if len(words) > 4:
            members.labels[words[4].decode("utf-8", "backslashreplace")] += 1
    rows = corpus.index[ids]
    columns = [pa.array(keys, pa.string()), pa.repeat(pa.scalar(_text(tar)), len(ids)), *_labels(corpus, ids)]
    columns += [pa.array(rows["width"]), pa.array(rows["height"])]
    columns += [pa.array([_text(origins[place]) for place in places], pa.string())]
    return pa.Table.from_arrays(columns, schema=_schema(corpus))


def _labels(corpus: Corpus, ids: np.ndarray[Any, Any]) -> list[pa.Array]:
    of_row, classes, weights = corpus.labels_of(ids)
    names = [corpus.classes] + ([corpus.class_descriptions] if corpus.class_descriptions is not None else [])
    texts = [pa.array([_text(name) for name in each], pa.string()).take(pa.array(classes)) for each in names]
    numbers = pa.array(classes.astype(np.int32))
    if corpus.label_kind == "single":
        return [numbers, *texts]
    ends = pa.array(np.searchsorted(of_row, np.arange(len(ids) + 1)).astype(np.int32))
    return [pa.ListArray.from_arrays(ends, column) for column in (numbers, pa.array(weights), *texts)]


def _text(name: str) -> str:
    """As UTF-8 can hold it: names of files may be any bytes."""
    return name.encode("utf-8", "backslashreplace").decode()
