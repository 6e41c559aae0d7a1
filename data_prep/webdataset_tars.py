"""The WebDataset convention, as webdataset and DALI read it: which members of a tar are a sample, and their labels.

Members that follow each other and have the same key are a sample. The key is the path up to the first dot of the file's
name, what follows the dot is the extension; letters of extensions may be of either case.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from data_prep.reasons import repeatable
from data_prep.tar_headers import Member

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
_META = re.compile(rb"__[^/]*__($|/)")
MAX_CLASS = 10**6
"""Above any class number in use; a larger one is something else, and a list of so many classes would fill memory."""
_MAX_LABEL_BYTES = 1 << 20


class UnusableSample(ValueError):  # noqa: N818 - it says what the sample is
    """A sample that cannot be trained on; the message is the reason, for the quarantine list."""

    def __init__(self, reason: str) -> None:
        super().__init__(repeatable(reason))


@dataclass
class TarSample:
    """The members of one key."""

    key: bytes
    members: list[tuple[str, Member]] = field(default_factory=list)
    """(extension in small letters, member), in the order of the tar."""

    def image(self) -> Member:
        """The image.

        Raises:
            UnusableSample: there is none, or more than one.
        """
        found = [(extension, member) for extension, member in self.members if extension in IMAGE_EXTENSIONS]
        if not found:
            raise UnusableSample(f"no image ({', '.join(IMAGE_EXTENSIONS)}) under this key")
        if len(found) > 1:
            raise UnusableSample(f"{len(found)} images under one key: {', '.join(name for name, _ in found)}")
        return found[0][1]

    def label(self, extension: str) -> Member:
        """The label, a member with this extension.

        Raises:
            UnusableSample: there is none, or more than one, or it is longer than labels are.
        """
        found = [member for name, member in self.members if name == extension]
        if len(found) != 1:
            raise UnusableSample(
                f"no .{extension} next to the image" if not found else f"{len(found)} .{extension} under one key"
            )
        if found[0].size > _MAX_LABEL_BYTES:
            raise UnusableSample(f".{extension} has {found[0].size:,} bytes: no label")
        return found[0]


def split_name(name: bytes) -> tuple[bytes, bytes]:
    """The key and the extension of a member's name; the extension is empty where there is none."""
    folder, slash, base = name.rpartition(b"/")
    # a dot at the beginning hides a file and begins no extension
    stem, _, extension = base[1:].partition(b".")
    return folder + slash + base[:1] + stem, extension


def iterate_samples(members: Iterable[Member]) -> Iterator[TarSample]:
    """Group the members of a tar; folders, links, hidden files, `__meta__` files and those without an extension belong
    to no sample."""
    sample: TarSample | None = None
    for member in members:
        key, extension = split_name(member.name)
        hidden = key.rpartition(b"/")[2].startswith(b".") or _META.match(member.name)
        if member.kind != b"0" or not extension or hidden:
            continue
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = TarSample(key)
        sample.members.append((extension.decode("utf-8", "backslashreplace").lower(), member))
    if sample is not None:
        yield sample


def dali_index_line(members: Iterable[Member]) -> bytes:
    """A sample's line in an index of format v1.2: `extension offset size name` of every member.

    Words are split at white space there, and names do no more than name: white space in them is written as `_`.
    """
    entries = []
    for member in members:
        words = (split_name(member.name)[1], b"%d" % member.offset, b"%d" % member.size, member.name)
        entry = b" ".join(words)
        entries.append(entry if len(entry.split()) == 4 else b" ".join(re.sub(rb"\s", b"_", word) for word in words))
    return b" ".join(entries) + b"\n"


def dali_index(lines: Sequence[bytes]) -> bytes:
    """The content of an index of format v1.2: the number of samples, then their lines."""
    return b"".join([b"v1.2 %d\n" % len(lines), *lines])
