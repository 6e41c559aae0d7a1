"""Kinds of JPEGs, and of EXIF."""

import numpy as np
import simplejpeg
from PIL import ImageCms

from tests.image_files import (
    ASCII,
    BYTE,
    LONG,
    ODD,
    ORIENTATION,
    PICTURE,
    SLONG,
    SRGB,
    SSHORT,
    Kinds,
    adobe,
    app1,
    chunk,
    encoded,
    exif,
    jpeg_components,
    jpeg_with,
    png_with,
    segment,
    webp_with,
    xmp_segment,
)

_LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
_TYPES = {"BYTE": BYTE, "ASCII": ASCII, "LONG": LONG, "SSHORT": SSHORT, "SLONG": SLONG}


def colours() -> Kinds:
    plain = encoded(PICTURE, quality=92)
    for name, picture in (("even", PICTURE), ("odd", ODD)):
        pixels = np.asarray(picture)
        for subsampling in ("444", "422", "420", "440", "411", "Gray"):
            yield f"jpeg {subsampling}, {name} sides", simplejpeg.encode_jpeg(pixels, 92, "RGB", subsampling)
    wide = simplejpeg.encode_jpeg(np.asarray(PICTURE), 92, "RGB", "411")
    yield "jpeg 441", jpeg_components(wide, sampling=b"\x14\x11\x11")
    yield "jpeg progressive", encoded(ODD, progressive=True)
    yield "jpeg with restarts", encoded(PICTURE, restart_marker_rows=1)
    yield "jpeg gray", encoded(PICTURE.convert("L"))
    yield "jpeg gray progressive", encoded(PICTURE.convert("L"), progressive=True)
    gray = encoded(PICTURE.convert("L"))
    yield "jpeg gray with sampling 2x2", jpeg_components(gray, sampling=b"\x22")
    yield "jpeg gray with Adobe's marker", jpeg_with(gray, adobe(0))
    yield "jpeg RGB with Adobe's marker", (rgb := encoded(PICTURE, keep_rgb=True, subsampling=0))
    yield "jpeg RGB by its ids alone", jpeg_with(rgb, without=[0xEE])
    yield "jpeg with ids RGB and JFIF", jpeg_components(plain, ids=b"RGB")
    bare = jpeg_with(plain, without=[0xE0])
    yield "jpeg without JFIF", bare
    yield "jpeg without JFIF, strange ids", jpeg_components(bare, ids=b"\x05\x06\x07")
    yield "jpeg without JFIF, ids 0 1 2", jpeg_components(bare, ids=b"\0\x01\x02")
    for transform in (0, 1, 2, 77):
        yield f"jpeg with JFIF and Adobe's marker {transform}", jpeg_with(plain, adobe(transform))
        yield f"jpeg without JFIF, Adobe's marker {transform}", jpeg_with(bare, adobe(transform))
    cmyk = encoded(PICTURE.convert("CMYK"), quality=92)
    ycck = simplejpeg.encode_jpeg(np.asarray(PICTURE.convert("CMYK")), 92, "CMYK", "420")
    for name, data in (("CMYK", cmyk), ("YCCK", ycck)):
        yield f"jpeg {name}", data
        yield f"jpeg {name} without Adobe's marker", jpeg_with(data, without=[0xEE])
        yield (
            f"jpeg {name} and JFIF without Adobe's marker",
            jpeg_with(data, segment(0xE0, b"JFIF\0\x01\x01\0\0\x01\0\x01\0\0"), without=[0xEE]),
        )
        for transform in (0, 1, 2):
            yield f"jpeg {name} with Adobe's marker {transform}", jpeg_with(data, adobe(transform), without=[0xEE])
        yield f"jpeg {name} with a short Adobe marker", jpeg_with(data, segment(0xEE, b"Adobe\0"), without=[0xEE])
        yield f"jpeg {name} with two Adobe markers", jpeg_with(data, adobe(0))
        yield f"jpeg {name}, turned", jpeg_with(data, app1(exif(6)))
    yield "jpeg CMYK progressive", encoded(PICTURE.convert("CMYK"), progressive=True)
    yield "jpeg with an sRGB profile", encoded(PICTURE, icc_profile=SRGB)
    yield "jpeg with a Lab profile", encoded(PICTURE, icc_profile=_LAB)
    yield "jpeg CMYK with a profile", encoded(PICTURE.convert("CMYK"), icc_profile=SRGB)
    yield "jpeg of 12 bits (by its header)", plain.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc1\x00\x11\x0c")
    yield "jpeg and a second picture (MPO)", encoded(PICTURE, "MPO", save_all=True, append_images=[ODD])
    yield "jpeg and bytes behind it", plain + b"behind" * 50
    yield "jpeg 1 x 1", encoded(PICTURE.resize((1, 1)))
    yield "jpeg 300 x 1", encoded(PICTURE.resize((300, 1)))


def orientations() -> Kinds:
    plain = encoded(PICTURE, quality=92)
    for orientation in range(10):
        yield f"jpeg orientation {orientation}", jpeg_with(plain, app1(exif(orientation)))
        yield f"jpeg orientation {orientation}, MM", jpeg_with(plain, app1(exif(orientation, endian=">")))
    yield "jpeg odd sides, orientation 6", jpeg_with(encoded(ODD), app1(exif(6)))
    yield "jpeg gray, orientation 6", jpeg_with(encoded(PICTURE.convert("L")), app1(exif(6)))
    yield "jpeg progressive, orientation 7", jpeg_with(encoded(PICTURE, progressive=True), app1(exif(7)))
    for first, second in ((1, 6), (6, 1), (6, 3), (3, 8)):
        yield f"jpeg two EXIF, {first} then {second}", jpeg_with(plain, app1(exif(first)), app1(exif(second)))
    yield "jpeg two EXIF, 6 then none", jpeg_with(plain, app1(exif(6)), app1(exif(0, before=[(0x128, 2)])))
    yield "jpeg two EXIF, none then 6", jpeg_with(plain, app1(exif(0, before=[(0x128, 2)])), app1(exif(6)))
    yield "jpeg two EXIF, 6 then a broken one", jpeg_with(plain, app1(exif(6)), app1(b"XX*\0\x08\0\0\0"))
    yield "jpeg two EXIF, a broken one then 6", jpeg_with(plain, app1(b"XX*\0\x08\0\0\0"), app1(exif(6)))
    yield "jpeg two EXIF, 6 then one cut short", jpeg_with(plain, app1(exif(6)), app1(exif(3)[:15]))
    yield "jpeg two EXIF, 6 then an empty one", jpeg_with(plain, app1(exif(6)), app1(b""))
    yield "jpeg EXIF continued in a second segment", jpeg_with(plain, app1(exif(6)[:12]), app1(exif(6)[12:]))
    yield "jpeg XMP 6 alone", jpeg_with(plain, xmp_segment(6))
    yield "jpeg XMP 6, EXIF 3", jpeg_with(plain, xmp_segment(6), app1(exif(3)))
    yield "jpeg XMP 6, EXIF 1", jpeg_with(plain, app1(exif(1)), xmp_segment(6))
    yield "jpeg XMP 6, EXIF without orientation", jpeg_with(plain, app1(exif(0, before=[(0x128, 2)])), xmp_segment(6))
    yield "jpeg EXIF 6 before JFIF", jpeg_with(plain, app1(exif(6)), plain[2:20], without=[0xE0])
    yield "jpeg EXIF 6 just before the scan", jpeg_with(plain, back=app1(exif(6)))
    profile = segment(0xE2, b"ICC_PROFILE\0\1\1" + SRGB.ljust(9000, b"\0"))
    yield "jpeg EXIF 6 behind a long profile", jpeg_with(plain, profile, app1(exif(6)))
    yield "jpeg EXIF 6 with fill bytes before", jpeg_with(plain, b"\xff\xff" + app1(exif(6)))
    yield "jpeg EXIF 6 in APP2", jpeg_with(plain, segment(0xE2, b"Exif\0\0" + exif(6)))
    yield "jpeg Exif\\0\\xff 6", jpeg_with(plain, segment(0xE1, b"Exif\0\xff" + exif(6)))
    yield "jpeg EXIF\\0\\0 6 in capitals", jpeg_with(plain, segment(0xE1, b"EXIF\0\0" + exif(6)))
    yield "jpeg Exif\\0 6 with one zero", jpeg_with(plain, segment(0xE1, b"Exif\0" + exif(6)))
    yield "jpeg EXIF 6 behind junk", jpeg_with(plain, segment(0xE1, b"junk" + exif(6)), app1(exif(6)))
    yield "jpeg EXIF 6 behind a second image's end", plain + jpeg_with(plain, app1(exif(6)))
    yield "jpeg Photoshop's resources", jpeg_with(plain, segment(0xED, b"Photoshop 3.0\0" + exif(6)))


def exif_blocks() -> Kinds:
    """EXIF of unusual content, in a JPEG, a PNG and a WebP."""
    blocks = {
        f"{kind}, {endian}": exif(6, kind=number, endian=endian) for kind, number in _TYPES.items() for endian in "<>"
    }
    blocks |= {
        "two values": exif(6, count=2),
        "no value": exif(6, count=0),
        "behind another tag": exif(6, before=[(0x100, 5)]),
        "out of order": exif(6, before=[(0x128, 2)], after=[(0x100, 5)]),
        "twice, 6 and 3": exif(6, after=[(ORIENTATION, 3)]),
        "twice, 1 and 6": exif(1, after=[(ORIENTATION, 6)]),
        "in IFD1 alone": exif(0, before=[(0x128, 2)], thumbnail=6),
        "1 in IFD0, 6 in IFD1": exif(1, thumbnail=6),
        "cut in the entry": exif(6)[:18],
        "cut after the entry": exif(6)[:22],
        "without a next directory": exif(6)[:-4],
        "more entries said than there are": exif(6).replace(b"\x08\0\0\0\x01\0", b"\x08\0\0\0\x09\0"),
        "of order XX": b"XX" + exif(6)[2:],
        "with 43 for 42": exif(6).replace(b"II*\0", b"II+\0"),
        "with the directory far away": exif(6).replace(b"II*\0\x08", b"II*\0\x10")[:8] + bytes(8) + exif(6)[8:],
        "with the directory nowhere": exif(6).replace(b"II*\0\x08\0", b"II*\0\x08\x7f"),
        "300": exif(300),
        "0x0106": exif(0x0106),
    }
    jpeg, still, webp = encoded(PICTURE), encoded(PICTURE, "PNG"), encoded(PICTURE, "WEBP", quality=90)
    for name, block in blocks.items():
        yield f"jpeg orientation {name}", jpeg_with(jpeg, app1(block))
        yield f"png orientation {name}", png_with(still, before=chunk(b"eXIf", block))
        yield f"webp orientation {name}", webp_with(webp, (b"EXIF", block), flags=8)
