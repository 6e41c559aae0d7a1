"""Sources that cost more than they should: servers that drip or expand, tars with huge names, files that never end."""

import gzip
import http.server
import io
import ipaddress
import os
import resource
import socket
import tarfile
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.settings import SettingsError, resolve
from data_prep.columns import Strings
from data_prep.image_check import TOO_MANY_BYTES, UnusableImage, check_image
from data_prep.image_download import is_public
from data_prep.listing import SourceError
from data_prep.remote_images import FetchPolicy, RemoteImages
from data_prep.sample_labels import parse_label
from data_prep.shard import ShardSettings
from data_prep.source_settings import SourceSettings
from data_prep.sources import list_source
from data_prep.tar_headers import TarError, iterate_members
from data_prep.webdataset_tars import UnusableSample
from tests.corpora import encoded, image_folder

IMAGE = encoded(1)


def fetch(*addresses: str, **policy) -> list[bytes | str]:
    """Each image, or the reason in its place."""
    images = RemoteImages.at(addresses, FetchPolicy(**{"timeout": 1.0, "attempts": 1} | policy))
    sizes = np.zeros(len(addresses), np.uint64)
    found = []
    for group in images.groups(Strings.of([b""] * len(addresses)), sizes):
        found += [str(image) if isinstance(image, UnusableImage) else bytes(image) for image in group]
    return found


class Handler(http.server.BaseHTTPRequestHandler):
    server: http.server.HTTPServer

    def do_GET(self) -> None:
        send = getattr(self, f"send_{self.path.strip('/').partition('?')[0]}", None)
        if send is None:
            self.send_error(404)
            return
        send()

    def send_content(self, content: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(200)
        for header in (*headers, ("Content-Length", str(len(content)))):
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(content)

    def send_image(self) -> None:
        self.send_content(IMAGE)

    def send_packed(self) -> None:
        self.send_content(gzip.compress(IMAGE), ("Content-Encoding", "gzip"))

    def send_bomb(self) -> None:
        self.send_content(BOMB, ("Content-Encoding", "gzip"))

    def send_endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(os.urandom(1 << 20))
        except OSError:
            self.close_connection = True

    def send_large(self) -> None:
        self.send_content(LARGE)

    def send_drip(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.drip(b"x")

    def send_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        self.drip(b"x")

    def drip(self, piece: bytes) -> None:
        try:
            for _ in range(600):
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(0.1)
        except OSError:
            self.close_connection = True

    def send_redirect(self) -> None:
        self.send_response(302)
        self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/image")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_bombed(self) -> None:
        self.send_response(302)
        for header in (("Location", "/image"), ("Content-Encoding", "gzip"), ("Content-Length", str(len(BOMB)))):
            self.send_header(*header)
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(BOMB)

    def log_message(self, *_: object) -> None:
        pass


packer = zlib.compressobj(9, zlib.DEFLATED, 31)
BOMB = b"".join(packer.compress(bytes(1 << 20)) for _ in range(300)) + packer.flush()
LARGE = os.urandom(6 << 20)


@pytest.fixture(scope="module")
def address():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_images_come_whole_packed_or_not_small_or_large(address):
    assert fetch(*(f"{address}/{kind}" for kind in ("image", "packed", "large", "redirect"))) == [
        IMAGE, IMAGE, LARGE, IMAGE,
    ]  # fmt: skip


def test_answers_that_expand_or_do_not_end_are_no_images(address):
    assert fetch(f"{address}/bomb", f"{address}/endless") == ["compressed to less than 1/100: no image", TOO_MANY_BYTES]


def test_what_comes_with_a_redirection_is_not_read(address):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert fetch(f"{address}/bombed") == [IMAGE]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kB, of 300 MB"


def test_servers_that_drip_are_given_up_and_tried_again(address):
    slow = "could not be fetched: less than 4096 bytes a second in 1 attempts"
    assert fetch(f"{address}/drip", f"{address}/headers", f"{address}/image") == [slow, slow, IMAGE]


def test_a_server_that_never_shakes_hands_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]

        def drip() -> None:
            connected, _ = silent.accept()
            with connected:
                connected.sendall(b"\x16\x03\x03\x40\x00")  # a TLS record that is to come
                try:
                    for _ in range(300):
                        connected.sendall(b"\x02")
                        time.sleep(0.1)
                except OSError:
                    return

        threading.Thread(target=drip, daemon=True).start()
        [reason] = fetch(f"https://127.0.0.1:{port}/a.jpg")
        assert reason == "could not be fetched: ReadTimeout in 1 attempts"  # Python bounds a handshake as a whole


def test_private_addresses_are_refused_where_that_is_asked_for(address, monkeypatch):
    monkeypatch.setenv("http_proxy", address)  # which would be asked instead
    port = address.rpartition(":")[2]
    addresses = [f"{address}/image", f"http://localhost:{port}/image", f"http://[::ffff:127.0.0.1]:{port}/image"]
    for reason in fetch(*addresses, public_only=True):
        assert isinstance(reason, str)
        assert reason.startswith("not fetched: its server has the address ")
        assert "which is not a public one (fetch_public_only)" in reason


@pytest.mark.parametrize(
    ("host", "public"),
    [
        ("8.8.8.8", True), ("169.254.169.254", False), ("100.64.0.1", False), ("::1", False), ("fec0::1", False),
        ("2606:4700::1", True), ("64:ff9b::808:808", True), ("64:ff9b::a9fe:a9fe", False), ("64:ff9b:1::1", False),
        ("2002:808:808::1", True), ("2002:7f00:1::1", False), ("::ffff:10.0.0.1", False), ("::7f00:1", False),
        ("ff0e::1", False),
    ],
)  # fmt: skip
def test_an_address_that_leads_to_a_private_one_is_not_public(host: str, public: bool):
    assert is_public(ipaddress.ip_address(host)) is public


def test_names_in_tables_that_no_file_can_have_are_left_out(tmp_path: Path):
    (tmp_path / "loop.png").symlink_to("loop.png")
    names = [f"{'a' * 300}.png", "loop.png", "/" + "b" * 5000]
    (tmp_path / "right.png").write_bytes(IMAGE)
    rows = [f"{name},x" for name in [*names[:2], "right.png"]]
    (tmp_path / "table.csv").write_text("\n".join(["path,label", *rows]))
    listing = list_source(SourceSettings(source=str(tmp_path), labels=str(tmp_path / "table.csv")))
    assert sorted(name for name, _ in listing.left_out) == sorted(names[:2])
    (tmp_path / "table.csv").write_text(f"path,label\n{names[2]},x\n{tmp_path}/right.png,x\n")
    listing = list_source(SourceSettings(source=str(tmp_path), labels=str(tmp_path / "table.csv")))
    assert [name for name, _ in listing.left_out] == names[2:]


@pytest.mark.parametrize("weight", ["1e39", "-1", "NaN", "1e400", "1" + "0" * 400])
def test_weights_that_fp32_does_not_hold_are_refused(weight: str, tmp_path: Path):
    (tmp_path / "x.png").write_bytes(IMAGE)
    (tmp_path / "t.jsonl").write_text(f'{{"path": "x.png", "label": [1, 2], "weight": [1, {weight}]}}\n')
    with pytest.raises(SourceError, match=r"t\.jsonl, line 1: .*weight"):
        list_source(SourceSettings(source=str(tmp_path / "t.jsonl")))
    with pytest.raises(UnusableSample, match="weights"):
        parse_label(f'{{"labels": [1, 2], "weights": [1, {weight}]}}'.encode(), "json")


@pytest.mark.parametrize("row", [r'{"path": "\ud800.png", "label": 1}', r'{"path": "x.png", "label": "\uDFff"}'])
def test_half_a_character_in_a_table_is_refused_by_its_line(row: str, tmp_path: Path):
    (tmp_path / "t.jsonl").write_text(row + "\n")
    with pytest.raises(SourceError, match=r"t\.jsonl"):
        list_source(SourceSettings(source=str(tmp_path / "t.jsonl")))


@pytest.mark.parametrize("word", ["shard_mb=1e308", "image_kb=1e308", "fetch_timeout_s=1e10", "fetch_attempts=2000"])
def test_sizes_and_times_that_no_machine_has_are_refused(word: str):
    with pytest.raises(SettingsError, match=f"{word.partition('=')[0]} = .* less than or equal to"):
        resolve(ShardSettings, {"source": "/a", "destination": "/b"}, [word])


def test_links_in_a_circle_are_no_class_folders(tmp_path: Path):
    root = image_folder(tmp_path / "images", classes=2, images=2)
    (root / "circle").symlink_to("circle")
    (root / "c1" / "above").symlink_to("..")
    assert list_source(SourceSettings(source=str(root))).classes == ["c0", "c1"]


def test_paths_in_tables_that_are_no_files_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "giant.jpg").open("wb") as file:
        file.truncate(1 << 40)
    paths = [str(tmp_path / "pipe"), "/dev/zero", str(tmp_path), str(tmp_path / "giant.jpg")]
    none = "no file, but a folder, a pipe or a device"
    assert fetch(*paths) == [none, none, "cannot be read: Is a directory", TOO_MANY_BYTES]


def test_files_larger_than_any_image_are_left_out_unread(tmp_path):
    root = image_folder(tmp_path / "images", classes=2, images=2)
    with (root / "c1" / "giant.jpg").open("wb") as file:
        file.truncate(1 << 40)
    listing = list_source(SourceSettings(source=str(root)))
    assert len(listing) == 4
    assert listing.left_out == (("c1/giant.jpg", TOO_MANY_BYTES),)


def members(content: bytes) -> list[bytes]:
    def read_at(size: int, offset: int) -> bytes:
        return content[offset : offset + size]

    return [member.name for member in iterate_members(read_at, 0, len(content), "the tar")]


def tar_of(kind: bytes, extra: bytes, size: int | None = None) -> bytes:
    """A tar whose one file has an extra header of this kind before it."""
    head = tarfile.TarInfo("././@LongLink")
    head.type, head.size = kind, len(extra) if size is None else size
    file = tarfile.TarInfo("a.jpg")
    return b"".join(
        [head.tobuf(tarfile.GNU_FORMAT), extra, bytes(-len(extra) % 512), file.tobuf(), bytes(1024)]
    )  # fmt: skip


def test_long_names_are_read_up_to_a_bound():
    name = b"c/" * 2000 + b"a.jpg"
    assert members(tar_of(b"L", name + b"\0")) == [name]
    for kind in (b"L", b"x"):
        with pytest.raises(TarError, match=r"the tar is damaged at byte 0: a name of 8,388,608 bytes"):
            members(tar_of(kind, bytes(8 << 20)))


@pytest.mark.timeout(60)  # it took minutes when each record copied what was left
def test_a_pax_header_of_many_records_is_read_once():
    records = b"".join(b"%d k%06d=\n" % (12, number) for number in range(80_000))
    assert members(tar_of(b"x", records + b"14 path=b.jpg\n")) == [b"b.jpg"]


@pytest.mark.parametrize("size", [b"-512", b"-1", b"1_0", b"\xd9\xa1", b"9" * 30, b"", b"0x10"])
def test_sizes_in_pax_headers_are_numbers(size):
    record = b"size=" + size + b"\n"
    record = b"%2d %b" % (len(record) + 3, record) if len(record) > 6 else b"%d %b" % (len(record) + 2, record)
    with pytest.raises(TarError, match=r"the tar is damaged at byte 1024: its pax header gives a size of"):
        members(tar_of(b"x", record))


def test_a_header_with_a_negative_size_is_damaged():
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf())
    header[124:136] = b"-0000001000\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(TarError, match="the tar is damaged at byte 0: a member of -512 bytes"):
        members(bytes(header) + bytes(1024))


def test_a_long_name_in_a_gzip_tar_costs_no_more_than_its_bytes(tmp_path: Path):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        info = tarfile.TarInfo("c0/a.jpg")
        info.size = len(IMAGE)
        tar.addfile(info, io.BytesIO(IMAGE))
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar_of(b"L", b"x" * (200 << 20))[:-1024] + content.getvalue(), 1))
    with pytest.raises(ValueError, match="a name of 209,715,200 bytes"):
        list_source(SourceSettings(source=str(tmp_path / "a.tar.gz")))


@pytest.mark.parametrize(("image_format", "mode"), [("PNG", "RGB"), ("PNG", "1"), ("WEBP", "RGB"), ("JPEG", "CMYK")])
def test_small_files_of_many_pixels_are_refused_before_they_are_decoded(image_format, mode):
    file = io.BytesIO()
    Image.new(mode, (6800, 6700)).save(file, image_format)
    before = peak_memory()
    with pytest.raises(UnusableImage, match="too large: 6800x6700 pixels, more than 45,000,000: shrink it"):
        check_image(file.getvalue())
    assert peak_memory() - before < 50 << 20
    small = file.getvalue()
    assert len(small) < 5 << 20


def peak_memory() -> int:
    """Of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
