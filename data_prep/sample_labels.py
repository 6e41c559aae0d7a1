"""What the labels beside images in WebDataset tars are: numbers or names, one or many, in text or in JSON.

Other tools write `.cls` with a number or a name, and `.json` with {"label": 3}, {"class": "cat"}, {"labels": [3, 7],
"weights": [1, 0.4]} or other keys. The first samples of the tars tell which; a sample of another form is left out with
the reason.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from data_prep.columns import MAX_WEIGHT
from data_prep.corpus_format import LABEL_FORM
from data_prep.label_cells import LabelCells
from data_prep.label_numbers import EMPTY, class_number, number_of, same_label, why_no_class
from data_prep.table_labels import NO_LABEL, LabelKind
from data_prep.tar_headers import Member
from data_prep.webdataset_tars import MAX_CLASS, TarSample, UnusableSample

KEYS = (
    "labels", "label", "cls", "class", "classes", "class_id", "class_index", "class_idx", "label_id", "category",
    "category_id", "target", "class_name", "label_name", "wnid", "tags", "categories",
)  # fmt: skip
"""Of JSON's label, the likeliest first."""
MANY = "labels"
"""The key under which ours and others' tools write a list of labels, of one too."""
_LONGEST_CLS = 200
"""Bytes of a .cls member."""


class NoClass(UnusableSample):
    """A sample with a label that can be none of the classes, such as -1."""


@dataclass(frozen=True)
class LabelForm:
    """How labels stand in the members of tars."""

    extension: str
    """"cls" or "json"."""
    many: bool = False
    key: str | None = None
    """Of JSON's object; None for any of KEYS."""
    names: tuple[str, ...] | None = None
    """Where labels are names: those that there are, in the order of their numbers; None where they are numbers."""
    no_label: tuple[str, ...] = ()
    """Labels that are none."""
    cells: LabelCells = field(default_factory=LabelCells)
    """How a text of several labels is split, where one may be."""

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> "LabelForm":
        """That of the shards of a corpus."""
        many = manifest["label_kind"] == "multi"
        said = manifest.get(LABEL_FORM) or {"member": "json" if many else "cls"}
        names = tuple(manifest["classes"]) if said.get("names") else None
        cells = LabelCells(said.get("delimiter"))
        return cls(said["member"], many, said.get("key"), names, tuple(said.get("no_label", ())), cells)

    def describe(self) -> dict[str, Any] | None:
        """What a manifest says of it, by which `of` knows it again; None for the form of our own shards."""
        if self == LabelForm("json" if self.many else "cls", self.many):
            return None
        return {
            "member": self.extension, "key": self.key, "names": self.names is not None,
            "no_label": list(self.no_label), **({"delimiter": self.cells.delimiter} if self.cells.splits else {}),
        }  # fmt: skip

    @cached_property
    def _places(self) -> dict[str, int] | None:
        return None if self.names is None else {name: place for place, name in enumerate(self.names)}

    def labels(self, content: bytes, num_classes: int | None = None) -> list[tuple[int, float]]:
        """The labels in a member: [(class, weight)], sorted by class; none where all of them are none.

        Args:
            num_classes: how many there are, or None where that is not known yet.

        Raises:
            UnusableSample: of another form, a class that does not exist, or not one label where one is read.
            NoClass: what people write for "no label", where nobody has said that it is none.
        """
        texts = self.texts(content)
        numbers: list[tuple[int, float]] = []
        places = self._places
        for text, weight in texts:
            number = class_number(text) if places is None else places.get(text)
            if number is None and places is None and number_of(text) is None:
                raise UnusableSample(f".{self.extension} is no class number but {text[:40]!r}")
            limit = (MAX_CLASS if num_classes is None else num_classes) if self.names is None else len(self.names)
            if number is None or not number < limit:
                where = f"outside 0..{limit - 1}" if places is None else f"none of the {limit} classes"
                raise UnusableSample(f"class {text[:40]} is {where}")
            numbers.append((number, weight))
        if len({number for number, _ in numbers}) < len(numbers):
            raise UnusableSample(f".{self.extension}: a class stands twice in `labels`")
        return sorted(numbers)

    def texts(self, content: bytes) -> list[tuple[str, float]]:
        """The labels in a member as they are written, with their weights, without those that are none.

        Raises:
            UnusableSample: of another form.
            NoClass: as `labels`.
        """
        pairs, _ = read_labels(content, self)
        left = [(text, weight) for text, weight in pairs if not any(same_label(text, none) for none in self.no_label)]
        for text, _ in left:
            why = why_no_class(text)
            if why is not None:
                raise NoClass(f"label {text!r} {why}, and so no class: no_label={text or EMPTY} takes it as no label")
        if not self.many and len(left) > 1:
            raise UnusableSample(f"{len(left)} labels where one is read (labels_per_image=many reads all)")
        if not self.many and not left:
            raise UnusableSample(NO_LABEL if pairs else "its list of labels is empty")
        return left


def read_labels(content: bytes, form: LabelForm) -> tuple[list[tuple[str, float]], bool]:
    """The labels in a member as they are written, with their weights, and whether these or a plain list say many."""
    if form.extension == "cls":
        text = content[:_LONGEST_CLS].decode("utf-8", "replace").strip()
        if len(content) > _LONGEST_CLS or not text.isprintable():
            raise UnusableSample(f".cls is no class number but {text[:40]!r}")
        return [(label, 1.0) for label in _split(text, form)], False
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UnusableSample(f".json is damaged: {error}") from None
    key = form.key or (next((key for key in KEYS if key in value), None) if isinstance(value, dict) else None)
    if not isinstance(value, dict) or key is None or key not in value:
        raise UnusableSample(_why_no_label(value, form.key))
    labels = value[key] if isinstance(value[key], list) else [value[key]]
    if isinstance(value[key], str):
        labels = _split(value[key].strip(), form)
    texts = [_text(label) for label in labels]
    if None in texts:
        raise UnusableSample(f".json: {key} is neither a class number nor a name, nor a list of them")
    weights = value.get("weights", [1.0] * len(labels))
    if not (
        isinstance(weights, list)
        and len(weights) == len(labels)
        and all(type(weight) in (int, float) and 0 <= weight <= MAX_WEIGHT for weight in weights)
    ):
        raise UnusableSample(".json: `weights` must be as many numbers as there are `labels`, none below 0")
    says_many = (isinstance(value[key], list) and key == MANY) or "weights" in value
    return [(str(text), float(weight)) for text, weight in zip(texts, weights, strict=True)], says_many


def _split(text: str, form: LabelForm) -> list[str]:
    try:
        return form.cells.split(text)
    except ValueError as error:
        raise UnusableSample(f".{form.extension}: {text[:40]!r}: {error}") from None


def _text(label: Any) -> str | None:
    """A label as text; None for what is none."""
    if isinstance(label, str):
        return label.strip()
    if type(label) is int and label.bit_length() < 64:
        return str(label)
    return repr(label) if type(label) is float else None


def _why_no_label(value: Any, key: str | None) -> str:
    if not isinstance(value, dict):
        return ".json is no object with a label"
    keys = ", ".join(sorted(re.sub(r"\s", " ", str(name))[:40] for name in value)[:8]) or "none"
    return f".json has no {key or 'label'}: its keys are {keys} (label_column= names that of a label)"


def told_by(form: LabelForm, kind: LabelKind, contents: Iterable[bytes]) -> LabelForm | None:
    """The form of labels by those of the first samples; None where none of them has a label.

    Args:
        form: what is known of it: the member, and perhaps the key.
        kind: how many labels an image has, or "auto" to be told.
    """
    found: list[tuple[list[str], bool]] = []
    keys: Counter[str] = Counter()
    for content in contents:
        try:
            pairs, says_many = read_labels(content, form)
        except UnusableSample:
            continue
        found.append(([text for text, _ in pairs], says_many))
        keys[_key_of(content, form)] += 1
    if not found:
        return None
    texts = [text for some, _ in found for text in some if not why_no_class(text)]
    are_names = sum(number_of(text) is None for text in texts) * 2 > len(texts)
    many = kind == "many" or (kind == "auto" and any(says or len(some) > 1 for some, says in found))
    key = form.key
    if form.extension == "json" and key is None:
        key = keys.most_common(1)[0][0]
        key = None if key in (MANY, "label") and many and not are_names else key
    return replace(form, many=many, key=key, names=() if are_names else None)


def _key_of(content: bytes, form: LabelForm) -> str:
    if form.extension == "cls":
        return ""
    value = json.loads(content)
    return next(key for key in (form.key, *KEYS) if key is not None and key in value)


def described(form: LabelForm) -> str:
    """A form in words, for the log."""
    what = "names" if form.names is not None else "numbers"
    return f"labels are {what} in {described_member(form)}, {'many' if form.many else 'one'} an image"


def described_member(form: LabelForm) -> str:
    """Where labels stand, in words."""
    return f".{form.extension}" + (f" under {form.key!r}" if form.key else "")


def forms_of(manifest: Mapping[str, Any]) -> tuple[LabelForm, ...]:
    """How labels stand in the shards of a corpus: as those who wrote its tars have them, and as in ours, appended."""
    many = manifest["label_kind"] == "multi"
    return tuple(dict.fromkeys((LabelForm.of(manifest), LabelForm("json" if many else "cls", many))))


def label_of(
    sample: TarSample, read: Callable[[Member], bytes], forms: Sequence[LabelForm], num_classes: int
) -> tuple[Member, list[tuple[int, float]]]:
    """The member with the label of a sample of a corpus, and its labels [(class, weight)], by the form that fits.

    Args:
        read: gives the content of a member.

    Raises:
        UnusableSample: no form fits.
    """
    for form in forms[:-1]:
        with suppress(UnusableSample):
            member = sample.label(form.extension)
            return member, form.labels(read(member), num_classes)
    member = sample.label(forms[-1].extension)
    return member, forms[-1].labels(read(member), num_classes)


def parse_label(content: bytes, extension: str, num_classes: int | None = None) -> list[tuple[int, float]]:
    """The labels in a member as our own shards have them: [(class, weight)], sorted by class.

    Args:
        content: of the member; `.cls` is a number in ASCII, `.json` an object with `labels` (class numbers) and
            perhaps `weights` (1 where left out), or with `label`, one class number.
        extension: "cls" or "json".
        num_classes: how many there are, or None where that is not known yet.

    Raises:
        UnusableSample: of another form, or a class that does not exist.
    """
    return LabelForm(extension, many=extension == "json").labels(content, num_classes)
