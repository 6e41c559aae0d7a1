"""Kinds of images: refused when sharding, or the same pixels in training, in evaluation and for consumers."""

import itertools

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from data_prep.convert import Conversion, convert
from data_prep.image_check import ImageFacts, UnusableImage, check_image
from data_prep.image_pixels import open_upright
from data_prep.perceptual_hash import describe_images, similarity
from data_prep.training_decoder import decode_as_training
from models.preprocess import Preprocessing, decode
from tests.image_damage import damaged, wrongly_taken
from tests.image_files import (
    ORIENTATION,
    PICTURE,
    SHORT,
    adobe,
    app1,
    chunk,
    encoded,
    exif,
    jpeg_with,
    photograph,
    png,
    png_with,
    tiff,
    xmp_segment,
)
from tests.image_kinds import Row, all_kinds, table

REFUSED = {
    "jpeg CMYK, turned": "training .DALI. and consumers .Pillow. would see different pixels",
    "jpeg CMYK with a short Adobe marker": "damaged JPEG: cannot identify image file$",
    "jpeg two EXIF, 1 then 6": "two EXIF blocks ask for different orientations",
    "jpeg two EXIF, 6 then 3": "two EXIF blocks",
    "png two eXIf, 6 then 1": "two EXIF blocks",
    "png orientation more entries said than there are": "its EXIF is damaged and may ask for a turn",
    "png gray and alpha 16": "16-bit gray with alpha",
    "png without IEND": "DALI. does not decode it",
    "png with a wrong checksum of the pixels": "DALI. does not decode it",
    "apng, eXIf 6": "would see different pixels",
    "webp a flag of EXIF without any": "DALI. does not decode it",
    "webp XMP of odd length, EXIF 6": "DALI. does not decode it",
    "bmp run-length 4": "4 bits, run-length encoded",
    "tiff gray 8 signed": "DALI. does not decode it",
    "tiff gray float": "TIFF of a rare kind",
    "tiff RGB and premultiplied alpha": "premultiplied",
    "gif": "GIF images are not supported",
}
"""Kinds with reasons, of which some end DALI's process."""
TAKEN = (
    "jpeg 411, odd sides", "jpeg 441", "jpeg RGB by its ids alone", "jpeg CMYK", "jpeg YCCK",
    "jpeg CMYK without Adobe's marker",
    "jpeg YCCK and JFIF without Adobe's marker", "jpeg XMP 6 alone", "jpeg two EXIF, none then 6",
    "jpeg orientation BYTE, <", "jpeg orientation BYTE, >",
    "jpeg orientation LONG, >", "png orientation twice, 6 and 3", "png eXIf 6 with Exif\\0\\0", "png exif in zTXt",
    "png XMP 6", "png gray 16", "png RGB 16 with tRNS", "png palette 4 with tRNS, interlaced", "png with gAMA 1.0",
    "apng, default image outside of it", "webp lossless RGBA", "webp XMP 6", "webp animated", "bmp run-length 8",
    "tiff gray 16 >", "tiff XMP 6", "tiff RGB in planes", "tiff L orientation 6",
)  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return {row.name: row for row in table(all_kinds())}


def test_every_kind_is_refused_or_the_same_everywhere(rows):
    assert [str(row) for row in rows.values() if not row.holds] == []


def test_few_kinds_are_refused(rows):
    taken = {name for name, row in rows.items() if isinstance(row.facts, ImageFacts)}
    assert set(TAKEN) <= taken
    assert {f"{kind} orientation {n}" for kind in ("jpeg", "tiff RGB") for n in range(10)} <= taken
    assert len(taken) > 380


@pytest.mark.parametrize("name", REFUSED)
def test_what_training_could_not_show_as_consumers_see_it_is_refused(name):
    with pytest.raises(UnusableImage, match=REFUSED[name]):
        check_image(all_kinds()[name])


def test_of_damaged_images_none_is_taken_that_training_cannot_decode():
    """Three of each kind; `python -m tests.image_damage` does 1,440."""
    rows = table(dict(damaged(141, seed=5)))
    assert [str(row) for row in wrongly_taken(rows)] == []
    taken = sum(isinstance(row.facts, ImageFacts) for row in rows)
    assert 20 < taken < 100


def test_two_exif_blocks_are_taken_only_if_they_agree():
    """Of others DALI makes pixels that are not those of any orientation, or ends the process."""
    plain = encoded(PICTURE)
    for first, second in itertools.product(range(1, 9), repeat=2):
        data = jpeg_with(plain, app1(exif(first)), app1(exif(second)))
        if first == second:
            facts = check_image(data)
            assert (facts.height, facts.width) == decode_as_training(data).shape[:2]
        else:
            with pytest.raises(UnusableImage, match="two EXIF blocks"):
                check_image(data)


def test_damaged_exif_is_harmless_without_a_turn():
    """Photographs have it, with entries that point nowhere."""
    strayed = [exif(orientation, after=[(0x011A, 60_000)]) for orientation in (1, 6)]
    for plain, put in (
        (encoded(PICTURE), lambda data, block: jpeg_with(data, app1(block))),
        (encoded(PICTURE, "PNG"), lambda data, block: png_with(data, before=chunk(b"eXIf", block))),
    ):
        upright, turned = (put(plain, block) for block in strayed)
        check_image(upright)
        np.testing.assert_array_equal(decode(upright), decode_as_training(upright))
        with pytest.raises(UnusableImage, match="its EXIF is damaged"):
            check_image(turned)


# ------------------------------------------------------------------------------------------------- the consumer


def test_packages_of_before_the_rule_answer_as_they_did():
    """Without `decoding` a package's preprocessing is Pillow's own: XMP turns, every CMYK is inverted."""
    old = Preprocessing.from_json({"size": 32})
    new = Preprocessing(32, decoding="dali")
    assert Preprocessing.from_json(new.to_json()) == new
    cmyk = encoded(PICTURE.convert("CMYK"), quality=95)
    odd = {
        "XMP": (jpeg_with(encoded(PICTURE), xmp_segment(3)), PICTURE.rotate(180)),
        "CMYK": (jpeg_with(cmyk, without=[0xEE]), PICTURE),
    }
    for data, shown_of_old in odd.values():
        seen = np.asarray(shown_of_old.resize((32, 32), Image.Resampling.BILINEAR), np.float32)
        levels = old([data])[0].permute(1, 2, 0).numpy() * 127.5 + 127.5
        assert np.abs(levels - seen).mean() < 6
        other = new([data])[0].permute(1, 2, 0).numpy() * 127.5 + 127.5
        assert np.abs(other - seen).mean() > 20
    with pytest.raises(ValueError, match="decoding = 'opencv'"):
        Preprocessing(32, decoding="opencv")  # type: ignore[arg-type]


def test_what_sharding_refuses_consumers_still_get_by_the_same_rule():
    plain = encoded(PICTURE)
    turned = np.asarray(Image.fromarray(decode(plain)).transpose(Image.Transpose.ROTATE_270))
    both = jpeg_with(plain, app1(exif(6)), app1(exif(3)))
    np.testing.assert_array_equal(decode(both), turned)
    np.testing.assert_array_equal(decode(jpeg_with(plain, app1(exif(6)[:25]))), turned)
    short = jpeg_with(plain, adobe(1), app1(exif(6, before=[(0x100, 1), (ORIENTATION - 1, 9)])))
    np.testing.assert_array_equal(decode(short), turned)


# ------------------------------------------------------------------------------------------------------ 16 bits


def sixteen_bits() -> dict[str, bytes]:
    """Of one picture, whose gray has 16 bits."""
    gray = np.asarray(photograph(120, 160, 11).convert("L"))[..., None]
    deep = gray * np.uint16(256) + np.random.default_rng(0).integers(0, 256, gray.shape, np.uint16)
    tags = [(258, SHORT, [16]), (259, SHORT, [1]), (262, SHORT, [1]), (277, SHORT, [1])]
    opaque = np.full_like(deep, 65535)
    return {
        "png gray": png(deep, 0, 16),
        "png gray, turned": png(np.rot90(deep), 0, 16, before=chunk(b"eXIf", exif(6))),
        "png RGB": png(np.repeat(deep, 3, axis=2), 2, 16),
        "png RGBA": png(np.concatenate([deep, deep, deep, opaque], axis=2), 6, 16),
        "tiff little-endian": tiff(160, 120, tags, [deep.astype("<u2").tobytes()]),
        "tiff big-endian": tiff(160, 120, tags, [deep.astype(">u2").tobytes()], endian=">"),
        "tiff LZW": encoded(Image.fromarray(deep[..., 0]), "TIFF", compression="tiff_lzw"),
    }


@pytest.mark.parametrize("name", sixteen_bits())
def test_16_bits_are_shrunk_and_described_as_training_and_consumers_see_them(name):
    data = sixteen_bits()[name]
    facts = check_image(data)
    shown = decode(data)
    assert (facts.height, facts.width) == shown.shape[:2] == (120, 160)
    np.testing.assert_array_equal(np.asarray(open_upright(data).convert("RGB")), shown)

    stored, after = convert(data, facts, Conversion(max_side=80))
    small = Image.fromarray(shown).resize((80, 60), Image.Resampling.LANCZOS, reducing_gap=3.0)
    assert (after.extension, after.width, after.height) == ("jpg", 80, 60)
    assert np.abs(decode(bytes(stored)).astype(int) - np.asarray(small)).mean() < 3

    of_deep, of_shown = describe_images([data, encoded(Image.fromarray(shown), "PNG")])
    assert of_deep["pictured"]
    assert of_deep["hash"] == of_shown["hash"]
    assert similarity(of_deep["shape"][None], of_shown["shape"][None], mirrored=False)[0] > 0.99


def test_duplicates_are_found_by_what_training_and_consumers_see(rows):
    large = [
        name
        for name, row in rows.items()
        if isinstance(row.facts, ImageFacts) and min(row.facts.width, row.facts.height) > 20
    ]
    as_stored = describe_images([all_kinds()[name] for name in large])
    as_shown = describe_images([encoded(Image.fromarray(decode(all_kinds()[name])), "PNG") for name in large])
    bits = [int(different).bit_count() for different in as_stored["hash"] ^ as_shown["hash"]]
    alike = (np.array(bits) <= 3) & (as_stored["pictured"] == as_shown["pictured"])
    assert [name for name, same in zip(large, alike, strict=True) if not same] == []


def test_a_crop_is_cut_from_the_upright_image(rows):
    """As training decodes: only the part that it shows."""
    taken = {name: row.facts for name, row in rows.items() if isinstance(row.facts, ImageFacts)}
    large = {name: facts for name, facts in taken.items() if min(facts.width, facts.height) > 20}
    files = [np.frombuffer(all_kinds()[name], np.uint8) for name in large]
    corners = [np.array([facts.height // 3, facts.width // 5]) for facts in large.values()]
    sides = [np.array([facts.height // 2, facts.width // 3]) for facts in large.values()]

    @pipeline_def(batch_size=len(files), num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph():
        encoded, corner, side = fn.external_source(source=lambda: (files, corners, sides), num_outputs=3, batch=True)
        return fn.decoders.image_slice(
            encoded, corner, side, axis_names="HW", normalized_anchor=False, normalized_shape=False,
            device="cpu", output_type=types.RGB,
        )  # fmt: skip

    pipeline = graph()
    pipeline.build()
    (output,) = pipeline.run()
    for row, (name, (top, left), (height, width)) in enumerate(zip(large, corners, sides, strict=True)):
        part = decode(all_kinds()[name])[top : top + height, left : left + width]
        np.testing.assert_array_equal(np.asarray(output.at(row)), part, err_msg=name)
