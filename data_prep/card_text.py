"""What the dataset card (README.md) and _info.json beside a corpus say, and whose such a file is."""

import json
import re
from typing import Any, Literal

import xxhash
import yaml

from data_prep.corpus import Corpus
from data_prep.corpus_format import LABEL_FORM, SHARDS_AT, needs_own_shards
from data_prep.endings import for_readers, in_words
from data_prep.sample_labels import LabelForm, described
from data_prep.sample_table import TABLE, Members

SPLIT = "train"
"""What the other libraries call the images of a corpus: what they are asked for where nothing else is said."""

_MARK = re.compile(r"\n<!-- Written by Vitforge, xxh3_128 of what is above: ([0-9a-f]{32}) -->\n\Z")
_KEY = "vitforge"
"""In _info.json: under which it says that we wrote it."""

Whose = Literal["ours", "edited", "other"]


def whose_card(content: bytes) -> Whose:
    """Whether a README.md is ours as we wrote it, ours and edited since, or somebody else's."""
    text = content.decode("utf-8", "replace")
    mark = _MARK.search(text)
    if mark is None:
        return "other"
    return "ours" if mark[1] == xxhash.xxh3_128_hexdigest(text[: mark.start()].encode()) else "edited"


def card(corpus: Corpus, members: Members) -> bytes:
    """The README.md of a corpus: the first lines for Hugging Face's datasets, the rest for people."""
    facts = yaml.safe_dump(_facts(corpus, members), sort_keys=False, allow_unicode=True, width=2**31)
    text = f"---\n{facts}---\n\n{_text(corpus, members)}"
    return f"{text}\n<!-- Written by Vitforge, xxh3_128 of what is above: {_digest(text)} -->\n".encode()


def said_in(content: bytes) -> tuple[int | None, list[str] | None]:
    """The number of images and the class names that the first lines of a README.md give; None where they do not."""
    front = re.match(r"\s*---\r?\n(.*?)\r?\n---", content.decode("utf-8", "replace"), re.DOTALL)
    try:
        info = yaml.safe_load(front[1])["dataset_info"] if front else None
        images = sum(split["num_examples"] for split in info["splits"]) if info and "splits" in info else None
        named = [_names_in(feature) for feature in info.get("features", [])] if info else []
        names = next((list(each.values()) for each in named if each), None)
    except (yaml.YAMLError, TypeError, KeyError, AttributeError, RecursionError):
        return None, None
    return images, names


def names_of(corpus: Corpus) -> list[str] | None:
    """The class names as the card gives them; None where two would be alike."""
    names = [_printable(name) for name in corpus.classes]
    return names if len(set(names)) == len(names) else None


def _names_in(feature: Any) -> dict[str, str] | None:
    if "dtype" in feature:
        kind = feature["dtype"]
        return kind["class_label"]["names"] if isinstance(kind, dict) and "class_label" in kind else None
    inner = [part["list"] for part in feature.get("struct", []) if isinstance(part.get("list"), dict)]
    return next((kind["class_label"]["names"] for kind in inner if "class_label" in kind), None)


def whose_info(content: bytes) -> Whose:
    """As `whose_card`, of an _info.json."""
    try:
        value = json.loads(content)
        mark = value.pop(_KEY)["xxh3_128"]
        return "ours" if mark == _digest(json.dumps(value, sort_keys=True)) else "edited"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "other"


def info(corpus: Corpus) -> bytes:
    """The _info.json that timm's reader of WebDataset tars takes splits and their sizes from."""
    shards = corpus.manifest["shards"]
    split = {
        "name": SPLIT,
        "num_samples": len(corpus),
        "filenames": [shard["name"] for shard in shards],
        "shard_lengths": [shard["samples"] for shard in shards],
    }
    value: dict[str, Any] = {"splits": {SPLIT: split}}
    value[_KEY] = {"xxh3_128": _digest(json.dumps(value, sort_keys=True))}
    return (json.dumps(value, indent=1) + "\n").encode()


def is_readable_by_others(corpus: Corpus) -> bool:
    """Whether the tars in its folder hold its samples and no other corpus's."""
    return not needs_own_shards(corpus.manifest)


def endings_in_words(members: Members) -> str:
    """How many images have which ending."""
    return in_words(members.to_json()["images"])


def image_endings(members: Members) -> str:
    """The endings of the images as webdataset and DALI take them: jpg;png;webp."""
    return for_readers(members.to_json()["images"])


def _digest(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def _facts(corpus: Corpus, members: Members) -> dict[str, Any]:
    tars = is_readable_by_others(corpus)
    files = [{"split": SPLIT, "path": "*.tar" if tars else TABLE}]
    about: dict[str, Any] = {"config_name": "default"}
    features = _features(corpus, members) if tars else None
    if features is not None:
        about["features"] = features
    # of others' tars it reads the samples that this corpus leaves out, too, and would refuse another number
    if tars and not (members.of_others and corpus.manifest["quarantined"]):
        image_bytes = int(corpus.index["length"].sum(dtype="int64"))
        about["splits"] = [{"name": SPLIT, "num_bytes": image_bytes, "num_examples": len(corpus)}]
    facts: dict[str, Any] = {
        "task_categories": ["image-classification"],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    return facts | ({"dataset_info": about} if len(about) > 1 else {})


def _features(corpus: Corpus, members: Members) -> list[dict[str, Any]] | None:
    """The columns; None where their form is that of others, and is found out by who reads them."""
    if LABEL_FORM in corpus.manifest or (members.of_others and corpus.label_kind == "multi"):
        return None
    names = names_of(corpus)
    label: Any = "int64"
    if names is not None:
        label = {"class_label": {"names": {str(number): name for number, name in enumerate(names)}}}
    features: list[dict[str, Any]] = [{"name": ending, "dtype": "image"} for ending in members.to_json()["images"]]
    if corpus.label_kind == "single":
        features += [{"name": ending, "dtype": label} for ending in members.to_json()["labels"]]
    else:
        features += [
            {"name": "json", "struct": [{"name": "labels", "list": label}, {"name": "weights", "list": "float64"}]}
        ]
    return [*features, {"name": "__key__", "dtype": "string"}, {"name": "__url__", "dtype": "string"}]


def _text(corpus: Corpus, members: Members) -> str:
    kind = "one class an image" if corpus.label_kind == "single" else "many weighted labels an image"
    lines = [
        f"# {len(corpus):,} images of {len(corpus.classes):,} classes",
        "",
        f"Made by Vitforge (data_prep): {kind}. {_largest(corpus)}",
        "",
    ]
    if not is_readable_by_others(corpus):
        return "\n".join([*lines, *_of_part(corpus), *_of_table(corpus)])
    lines += [
        "The `.tar` files are WebDataset tars (`KEY.ENDING` and, of the same key, the label), the `.idx` files the "
        "index of each for DALI's `fn.readers.webdataset`. `manifest.json` and `index.bin` are Vitforge's own.",
        "",
        "```python",
        f'datasets.load_dataset(FOLDER)["{SPLIT}"]  # Hugging Face; streaming=True too',
        _webdataset_line(corpus, members),
        _timm_line(corpus, members),
        "```",
        "",
        f"Endings of the images: {endings_in_words(members)}.",
        "",
    ]
    if len(members.images) > 1:
        lines += [
            "Hugging Face makes a column of each, empty in the rows of the others; webdataset and DALI take them as "
            f"`{image_endings(members)}`. Every reader decodes by content: sharded with `ending=jpg`, all have one.",
            "",
        ]
    if LABEL_FORM in corpus.manifest:
        lines += [
            f"The tars were written by others: {described(LabelForm.of(corpus.manifest))}. Where `.cls` has names, "
            "Hugging Face's reader, which takes it for a number, fails; `python data_prep/shard.py FOLDER NEW` makes a "
            "corpus with numbers.",
            "",
        ]
    elif corpus.label_kind == "multi":
        lines += [
            'The label is JSON, `{"labels": [numbers], "weights": [weights]}`; for timm `target_key="labels"`. '
            "Readers that want one class an image (`cls`) have none here.",
            "",
        ]
    if members.of_others and (left := corpus.manifest["quarantined"]):
        lines += [
            f"The tars were written by others and are as they were: they hold {left:,} more samples, which "
            f"`{corpus.file_name('quarantine.jsonl')}` lists with the reasons. The `.idx` files and {TABLE} leave them "
            "out; what reads the tars alone meets them.",
            "",
        ]
    return "\n".join([*lines, *_of_table(corpus)])


def _webdataset_line(corpus: Corpus, members: Members) -> str:
    label = next(iter(members.to_json()["labels"]), "cls")
    endings = image_endings(members)
    return f'webdataset.WebDataset(glob.glob("FOLDER/*.tar")).decode("pil").to_tuple("{endings}", "{label}")'


def _timm_line(corpus: Corpus, members: Members) -> str:
    usual = set(members.images) <= {"jpg", "png", "webp"}  # what timm looks for where nothing is said
    form = LabelForm.of(corpus.manifest)
    key = form.key or ("labels" if form.many else "label")
    keys = ("" if usual else f', input_key="{image_endings(members)}"') + (
        f', target_key="{key}"' if form.extension == "json" else ""
    )
    return f'timm.data.create_dataset("wds/", FOLDER, split="{SPLIT}"{keys})  # reads _info.json'


def _largest(corpus: Corpus) -> str:
    counts = corpus.class_counts
    order = sorted(range(len(counts)), key=lambda number: (-counts[number], number))
    names = [" ".join(_printable(corpus.names[number]).split()) for number in (order[0], order[-1])]
    return f"The largest class is {names[0]} ({counts[order[0]]:,}), the smallest {names[1]} ({counts[order[-1]]:,})."


def _of_part(corpus: Corpus) -> list[str]:
    where = (
        "shares the tars of the corpus that it is a part of, and has none of its own"
        if SHARDS_AT in corpus.manifest
        else "was copied with whole tars by an older version: they hold images that are not in it"
    )
    return [
        f"**This is a part of a corpus. It {where}.** Vitforge reads it like any corpus. For every other reader of "
        "tars make a copy, which has tars of its own with these images only:",
        "",
        "    python data_prep/copy_corpus.py FOLDER COPY",
        "",
        "What other tools read here is the table of its samples, also by `datasets.load_dataset(FOLDER)`.",
        "",
    ]


def _of_table(corpus: Corpus) -> list[str]:
    one = corpus.label_kind == "single"
    columns = "key, shard, " + ("label, class" if one else "labels, weights, classes")
    columns += (", description" if one else ", descriptions") if corpus.class_descriptions is not None else ""
    count = "SELECT class, count(*) FROM" if one else "SELECT unnest(classes) AS class, count(*) FROM"
    return [
        f"`{TABLE}` has a row for each image, in the order of the sample ids: {columns}, width, height, origin.",
        "",
        "```python",
        f"duckdb.sql(\"{count} 'FOLDER/{TABLE}' GROUP BY class\")",
        f'pandas.read_parquet("FOLDER/{TABLE}")  # polars.read_parquet, too',
        "```",
    ]
