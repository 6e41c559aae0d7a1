"""Kinds of WebPs, BMPs and TIFFs, and of what sharding does not take."""

import numpy as np
from PIL import Image

from tests.image_files import (
    ALPHA,
    BYTE,
    HEIGHT,
    LONG,
    ODD,
    PICTURE,
    SHORT,
    SRGB,
    WIDTH,
    Kinds,
    bmp,
    encoded,
    exif,
    tiff,
    webp_with,
    xmp,
)


def webp_files() -> Kinds:
    for name, picture in (
        ("RGB", PICTURE),
        ("RGB odd sides", ODD),
        ("RGBA", ALPHA),
        ("gray", PICTURE.convert("L")),
    ):
        for lossless in (False, True):
            way = "lossless" if lossless else "lossy"
            data = encoded(picture, "WEBP", lossless=lossless, quality=90)
            yield f"webp {way} {name}", data
            for orientation in (6, 8) if picture is not PICTURE else range(10):
                for parity in (0, 1):
                    block = exif(orientation) + b"\0" * parity
                    flags = 8 | (16 if "A" in name else 0)
                    yield (
                        f"webp {way} {name}, EXIF {orientation} of {'odd' if parity else 'even'} length",
                        webp_with(data, (b"EXIF", block), flags=flags),
                    )
    lossy, profiled = encoded(PICTURE, "WEBP", quality=90), encoded(ODD, "WEBP", lossless=True)
    yield "webp EXIF 6 with Exif\\0\\0", webp_with(lossy, (b"EXIF", b"Exif\0\0" + exif(6)), flags=8)
    yield "webp EXIF 6 of order MM", webp_with(lossy, (b"EXIF", exif(6, endian=">")), flags=8)
    yield "webp EXIF 6 that no flag tells of", webp_with(lossy, (b"EXIF", exif(6)), flags=0)
    yield "webp a flag of EXIF without any", webp_with(lossy, flags=8)
    yield "webp EXIF 6 before the pixels", webp_with(lossy, (b"EXIF", exif(6)), flags=8, front=1)
    yield "webp two EXIF, 1 then 6", webp_with(lossy, (b"EXIF", exif(1)), (b"EXIF", exif(6)), flags=8)
    yield "webp two EXIF, 6 then 1", webp_with(lossy, (b"EXIF", exif(6)), (b"EXIF", exif(1)), flags=8)
    yield "webp XMP 6", webp_with(lossy, (b"XMP ", xmp(6)), flags=4)
    yield "webp XMP 6, EXIF 3", webp_with(lossy, (b"EXIF", exif(3)), (b"XMP ", xmp(6)), flags=12)
    yield (
        "webp XMP of odd length, EXIF 6",
        webp_with(lossy, (b"XMP ", xmp(1) + b" " * (len(xmp(1)) % 2 == 0)), (b"EXIF", exif(6)), flags=12),
    )
    yield "webp with a profile", webp_with(profiled, (b"ICCP", SRGB), flags=32, front=1)
    yield "webp with a profile, EXIF 6", webp_with(lossy, (b"ICCP", SRGB), (b"EXIF", exif(6)), flags=40, front=1)
    yield "webp with an unknown chunk", webp_with(lossy, (b"VFGE", b"odd"), flags=0)
    yield "webp animated", encoded(PICTURE, "WEBP", save_all=True, append_images=[ODD.resize(PICTURE.size)])
    yield "webp with bytes behind it", lossy + b"behind" * 20
    yield "webp 1 x 1", encoded(PICTURE.resize((1, 1)), "WEBP")


def bmp_files() -> Kinds:
    pixels = np.asarray(PICTURE)[:, :88]
    height, width = pixels.shape[:2]
    bgr = pixels[::-1, :, ::-1]
    palette = np.random.default_rng(0).integers(0, 256, (256, 4), np.uint8)
    palette[:, 3] = 0
    index = np.asarray(PICTURE.convert("L"))[::-1, :88]
    yield "bmp 24", encoded(PICTURE, "BMP")
    yield "bmp 24, odd sides", encoded(ODD, "BMP")
    yield "bmp gray", encoded(PICTURE.convert("L"), "BMP")
    yield "bmp 24 from the top", bmp(width, -height, 24, bgr[::-1].tobytes())
    yield "bmp 24, OS/2", bmp(width, height, 24, bgr.tobytes(), header=12)
    for header in (40, 108, 124):
        full = np.concatenate([bgr, np.full_like(bgr[..., :1], 200)], axis=2).tobytes()
        masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
        yield f"bmp 32, header {header}", bmp(width, height, 32, full, header=header)
        yield (
            f"bmp 32 with masks, header {header}",
            bmp(width, height, 32, full, header=header, compression=3, masks=masks[: 3 if header == 40 else 4]),
        )
        rgb_masks = (0xFF, 0xFF00, 0xFF0000)
        yield (
            f"bmp 32 with masks of RGB, header {header}",
            bmp(width, height, 32, full, header=header, compression=3, masks=rgb_masks),
        )
    zero_alpha = np.concatenate([bgr, np.zeros_like(bgr[..., :1])], axis=2).tobytes()
    yield "bmp 32 with alpha 0", bmp(width, height, 32, zero_alpha, header=108, compression=3,
                                     masks=(0xFF0000, 0xFF00, 0xFF, 0xFF000000))  # fmt: skip
    b, g, r = (bgr[..., channel].astype(np.uint16) for channel in range(3))
    small = ((r >> 3) << 10 | (g >> 3) << 5 | b >> 3).astype("<u2").tobytes()
    yield "bmp 16 (555)", bmp(width, height, 16, small)
    yield "bmp 16 (555 by masks)", bmp(width, height, 16, small, compression=3, masks=(0x7C00, 0x3E0, 0x1F))
    small = ((r >> 3) << 11 | (g >> 2) << 5 | b >> 3).astype("<u2").tobytes()
    yield "bmp 16 (565 by masks)", bmp(width, height, 16, small, compression=3, masks=(0xF800, 0x7E0, 0x1F))
    for bits in (1, 4, 8):
        planes = np.unpackbits((index >> (8 - bits)).astype(np.uint8)[:, :, None], axis=2)[:, :, 8 - bits :].reshape(
            height, -1
        )
        lines = [line.tobytes() for line in np.packbits(planes, axis=1)]
        data = b"".join(line + b"\0" * (-len(line) % 4) for line in lines)
        colours = palette[: 2**bits].tobytes()
        yield f"bmp palette {bits}", bmp(width, height, bits, data, palette=colours)
        yield f"bmp palette {bits} from the top", bmp(width, -height, bits, data, palette=colours)
        if bits == 8:
            short = palette[:, :3].tobytes()
            yield "bmp palette 8, OS/2", bmp(width, height, 8, data, palette=short, header=12)
        if bits > 1:
            code = b"".join(bytes([1 if bits == 8 else 2, value]) for value in index.tobytes()[:40])
            rle = (code + b"\0\0") * height + b"\0\1"
            yield (
                f"bmp run-length {bits}",
                bmp(40 if bits == 8 else 80, height, bits, rle, compression=1 if bits == 8 else 2, palette=colours),
            )


def tiff_files() -> Kinds:
    modes = {mode: ODD.convert(mode) for mode in ("1", "L", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "LA", "P", "F", "I")}
    modes["RGBA"] = ALPHA
    sixteen = np.asarray(ODD.convert("L")).astype(np.uint16) * 256 + 77
    modes["I;16"] = Image.fromarray(sixteen)
    for mode, picture in modes.items():
        yield f"tiff {mode}", encoded(picture, "TIFF")
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "lzma", "zstd", "webp", "jpeg",
                        "group3", "group4", "tiff_ccitt"):  # fmt: skip
        for mode in ("1",) if compression in ("group3", "group4", "tiff_ccitt") else ("L", "RGB", "RGBA"):
            try:
                yield f"tiff {mode} {compression}", encoded(modes[mode], "TIFF", compression=compression)
            except (OSError, ValueError, SystemError):
                continue  # a codec that this Pillow is without, or that does not take the mode
    yield "tiff I;16 lzw", encoded(modes["I;16"], "TIFF", compression="tiff_lzw")
    yield "tiff of two pictures", encoded(PICTURE, "TIFF", save_all=True, append_images=[ODD])
    yield "tiff big (64 bits)", encoded(PICTURE, "TIFF", big_tiff=True)
    rgb, gray = np.asarray(PICTURE), np.asarray(PICTURE.convert("L"))

    def tags(samples: int, photometric: int, bits: int = 8, *more: tuple[int, int, list[int]]) -> list[tuple]:  # type: ignore[type-arg]
        depth = (258, SHORT, [bits] * samples)
        return [depth, (259, SHORT, [1]), (262, SHORT, [photometric]), (277, SHORT, [samples]), *more]

    for orientation in range(10):
        for name, pixels in (("RGB", rgb), ("L", gray)):
            turn = (274, SHORT, [orientation])
            photometric = 2 if name == "RGB" else 1
            yield (
                f"tiff {name} orientation {orientation}",
                tiff(WIDTH, HEIGHT, tags(3 if name == "RGB" else 1, photometric, 8, turn), [pixels.tobytes()]),
            )
    long = (274, LONG, [6])
    yield "tiff orientation LONG", tiff(WIDTH, HEIGHT, tags(3, 2, 8, long), [rgb.tobytes()])
    yield "tiff MM orientation LONG", tiff(WIDTH, HEIGHT, tags(3, 2, 8, long), [rgb.tobytes()], endian=">")
    yield "tiff MM orientation 6", tiff(WIDTH, HEIGHT, tags(3, 2, 8, (274, SHORT, [6])), [rgb.tobytes()], endian=">")
    yield "tiff orientation BYTE", tiff(WIDTH, HEIGHT, tags(3, 2, 8, (274, BYTE, [6])), [rgb.tobytes()])
    yield "tiff XMP 6", tiff(WIDTH, HEIGHT, tags(3, 2, 8, (700, BYTE, list(xmp(6)))), [rgb.tobytes()])
    yield "tiff white is zero", tiff(WIDTH, HEIGHT, tags(1, 0), [gray.tobytes()])
    bits = np.packbits(gray > 127, axis=1).tobytes()
    yield "tiff 1 bit, white is zero", tiff(WIDTH, HEIGHT, tags(1, 0, 1), [bits])
    yield "tiff 1 bit, black is zero", tiff(WIDTH, HEIGHT, tags(1, 1, 1), [bits])
    yield "tiff 1 bit, filled from below", tiff(WIDTH, HEIGHT, tags(1, 1, 1, (266, SHORT, [2])), [bits])
    nibbles = (gray[:, ::2] & 0xF0 | gray[:, 1::2] >> 4).tobytes()
    yield "tiff 4 bits", tiff(WIDTH, HEIGHT, tags(1, 1, 4), [nibbles])
    deep = gray.astype(np.uint16) * 256 + 77
    for endian in "<>":
        yield (
            f"tiff gray 16 {endian}",
            tiff(WIDTH, HEIGHT, tags(1, 1, 16), [deep.astype(endian + "u2").tobytes()], endian=endian),
        )
    yield "tiff gray 16, white is zero", tiff(WIDTH, HEIGHT, tags(1, 0, 16), [deep.astype("<u2").tobytes()])
    signed = (339, SHORT, [2])
    yield (
        "tiff gray 16, orientation 6",
        tiff(WIDTH, HEIGHT, tags(1, 1, 16, (274, SHORT, [6])), [deep.astype("<u2").tobytes()]),
    )
    yield "tiff gray 16 signed", tiff(WIDTH, HEIGHT, tags(1, 1, 16, signed), [deep.astype("<u2").tobytes()])
    yield "tiff gray 8 signed", tiff(WIDTH, HEIGHT, tags(1, 1, 8, signed), [gray.tobytes()])
    yield "tiff gray 32", tiff(WIDTH, HEIGHT, tags(1, 1, 32), [(deep.astype("<u4") << 16).tobytes()])
    yield (
        "tiff gray float",
        tiff(WIDTH, HEIGHT, tags(1, 1, 32, (339, SHORT, [3])), [(gray / 255).astype("<f4").tobytes()]),
    )
    yield "tiff RGB 16", tiff(WIDTH, HEIGHT, tags(3, 2, 16), [(rgb.astype("<u2") * 257).tobytes()])
    yield (
        "tiff RGB in planes",
        tiff(WIDTH, HEIGHT, tags(3, 2, 8, (284, SHORT, [2])), [rgb[..., c].tobytes() for c in range(3)]),
    )
    yield (
        "tiff RGB in strips",
        tiff(
            WIDTH,
            HEIGHT,
            tags(3, 2, 8, (278, SHORT, [10])),
            [rgb[at : at + 10].tobytes() for at in range(0, HEIGHT, 10)],
        ),
    )
    square = np.zeros((64, 96, 3), np.uint8)
    square[:HEIGHT, :WIDTH] = rgb
    parts = [square[y : y + 32, x : x + 32].tobytes() for y in (0, 32) for x in (0, 32, 64)]
    sides = ((322, SHORT, [32]), (323, SHORT, [32]))
    yield "tiff RGB in tiles", tiff(WIDTH, HEIGHT, tags(3, 2, 8, *sides), parts, tiles=True)
    rgba = np.asarray(ALPHA)
    for meaning, name in ((0, "unknown"), (1, "premultiplied"), (2, "plain")):
        extra = (338, SHORT, [meaning])
        yield f"tiff RGB and {name} alpha", tiff(WIDTH, HEIGHT, tags(4, 2, 8, extra), [rgba.tobytes()])
    yield "tiff of four samples that says nothing of alpha", tiff(WIDTH, HEIGHT, tags(4, 2), [rgba.tobytes()])
    yield "tiff cut short", encoded(PICTURE, "TIFF")[:-500]
    yield "tiff with a profile", encoded(PICTURE, "TIFF", icc_profile=SRGB)


def others() -> Kinds:
    yield "gif", encoded(PICTURE.convert("P"), "GIF")
    yield "jpeg 2000", encoded(PICTURE, "JPEG2000")
    yield "jpeg 2000 codestream", encoded(PICTURE, "JPEG2000", no_jp2=True)
    yield "ppm", encoded(PICTURE, "PPM")
    yield "pgm", encoded(PICTURE.convert("L"), "PPM")
    yield "ico", encoded(PICTURE, "ICO")
    yield "tga", encoded(PICTURE, "TGA")
    yield "icns", encoded(PICTURE.resize((64, 64)), "ICNS")
    if "AVIF" in Image.SAVE:
        yield "avif", encoded(PICTURE, "AVIF")
