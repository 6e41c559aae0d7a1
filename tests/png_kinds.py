"""Kinds of PNGs."""

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.image_files import (
    ALPHA,
    HEIGHT,
    ODD,
    PICTURE,
    SRGB,
    WIDTH,
    Kinds,
    chunk,
    encoded,
    exif,
    photograph,
    png,
    png_with,
    raw_profile,
    xmp,
)


def modes() -> Kinds:
    rgb, rgba = np.asarray(ODD), np.asarray(ALPHA.resize(ODD.size))
    gray, gray_alpha = np.asarray(ODD.convert("L"))[..., None], np.asarray(ALPHA.resize(ODD.size).convert("LA"))
    index = np.random.default_rng(0).integers(0, 256, gray.shape, np.uint8) // 4 + gray // 2
    palette = chunk(b"PLTE", np.random.default_rng(1).integers(0, 256, 768, np.uint8).tobytes())
    deep = np.random.default_rng(2)
    for interlaced in (False, True):
        way = ", interlaced" if interlaced else ""
        for depth in (1, 2, 4, 8, 16):
            deeper: NDArray[Any] = gray * np.uint16(256) + deep.integers(0, 256, gray.shape, np.uint16)
            shown = gray >> (8 - depth) if depth <= 8 else deeper
            yield f"png gray {depth}{way}", png(shown, 0, depth, interlaced=interlaced)
            clear = chunk(b"tRNS", b"\0\x01")
            yield f"png gray {depth} with tRNS{way}", png(shown, 0, depth, before=clear, interlaced=interlaced)
            if depth <= 8:
                colours = palette[:4] + palette[4:]
                part = chunk(b"PLTE", colours[8 : 8 + 3 * 2**depth])
                shown = index >> (8 - depth)
                yield f"png palette {depth}{way}", png(shown, 3, depth, before=part, interlaced=interlaced)
                clear = part + chunk(b"tRNS", b"\0\x80")
                yield f"png palette {depth} with tRNS{way}", png(shown, 3, depth, before=clear, interlaced=interlaced)
        for name, pixels, kind in (("gray and alpha", gray_alpha, 4), ("RGB", rgb, 2), ("RGBA", rgba, 6)):
            yield f"png {name} 8{way}", png(pixels, kind, 8, interlaced=interlaced)
            values = pixels * np.uint16(256) + deep.integers(0, 256, pixels.shape, np.uint16)
            yield f"png {name} 16{way}", png(values, kind, 16, interlaced=interlaced)
        clear = chunk(b"tRNS", bytes([0, 9, 0, 9, 0, 9]))
        yield f"png RGB 8 with tRNS{way}", png(rgb, 2, 8, before=clear, interlaced=interlaced)
        values = rgb * np.uint16(257)
        yield f"png RGB 16 with tRNS{way}", png(values, 2, 16, before=clear, interlaced=interlaced)


def chunks() -> Kinds:
    plain = encoded(PICTURE, "PNG")
    for orientation in range(10):
        yield f"png eXIf {orientation}", png_with(plain, before=chunk(b"eXIf", exif(orientation)))
    block = exif(6)
    yield "png eXIf 6, MM", png_with(plain, before=chunk(b"eXIf", exif(6, endian=">")))
    yield "png eXIf 6 behind the pixels", png_with(plain, after=chunk(b"eXIf", block))
    yield "png eXIf 6 with Exif\\0\\0", png_with(plain, before=chunk(b"eXIf", b"Exif\0\0" + block))
    yield "png eXIf 6 with a wrong checksum", png_with(plain, before=chunk(b"eXIf", block, crc=1))
    yield "png two eXIf, 1 then 6", png_with(plain, before=chunk(b"eXIf", exif(1)) + chunk(b"eXIf", block))
    yield "png two eXIf, 6 then 1", png_with(plain, before=chunk(b"eXIf", block) + chunk(b"eXIf", exif(1)))
    yield "png two eXIf around the pixels", png_with(plain, before=chunk(b"eXIf", exif(3)), after=chunk(b"eXIf", block))
    for kind in (b"exif", b"APP1"):
        text = raw_profile(b"Exif\0\0" + block, kind)
        key = b"Raw profile type " + kind + b"\0"
        squeezed = chunk(b"zTXt", key + b"\0" + zlib.compress(text))
        yield f"png {kind.decode()} in zTXt", png_with(plain, before=squeezed)
        yield f"png {kind.decode()} in zTXt behind the pixels", png_with(plain, after=squeezed)
        yield f"png {kind.decode()} in tEXt", png_with(plain, before=chunk(b"tEXt", key + text))
        yield f"png {kind.decode()} in iTXt", png_with(plain, before=chunk(b"iTXt", key + b"\0\0\0\0" + text))
        both = squeezed + chunk(b"eXIf", exif(3))
        yield f"png {kind.decode()} in zTXt, eXIf 3", png_with(plain, before=both)
    packet = b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6)
    yield "png XMP 6", png_with(plain, before=chunk(b"iTXt", packet))
    yield "png XMP 6 behind the pixels", png_with(plain, after=chunk(b"iTXt", packet))
    yield "png XMP 6, eXIf 1", png_with(plain, before=chunk(b"eXIf", exif(1)) + chunk(b"iTXt", packet))
    gamma = chunk(b"gAMA", (100_000).to_bytes(4, "big"))
    yield "png with gAMA 1.0", png_with(plain, before=gamma)
    white = b"".join(n.to_bytes(4, "big") for n in (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000))
    yield "png with gAMA and cHRM", png_with(plain, before=gamma + chunk(b"cHRM", white))
    yield "png with sRGB", png_with(plain, before=chunk(b"sRGB", b"\0"))
    yield "png with cICP", png_with(plain, before=chunk(b"cICP", b"\x09\x10\0\x01"))
    yield "png with a profile", encoded(PICTURE, "PNG", icc_profile=SRGB)
    yield "png with sBIT", png_with(plain, before=chunk(b"sBIT", b"\x05\x05\x05"))
    yield "png with bKGD", png_with(encoded(ALPHA, "PNG"), before=chunk(b"bKGD", bytes([0, 200, 0, 100, 0, 0])))
    yield "png RGB with a palette", png_with(plain, before=chunk(b"PLTE", bytes(30)))
    yield "png in many pieces", png(np.asarray(PICTURE), 2, 8, pieces=40)
    yield "png with bytes behind the end", plain + b"behind" * 20
    yield "png with an unknown chunk", png_with(plain, before=chunk(b"vfGe", b"any"))
    yield "png with an unknown critical chunk", png_with(plain, before=chunk(b"VFGE", b"any"))
    yield "png without IEND", plain[:-12]
    yield "png with a wrong checksum of IEND", plain[:-1] + b"\0"
    at = plain.rindex(b"IEND") - 8
    yield "png with a wrong checksum of the pixels", plain[:at] + bytes(4) + plain[at + 4 :]
    yield "png with a wrong checksum of text", png_with(plain, before=chunk(b"tEXt", b"a\0b", crc=5))
    yield "png of Apple (CgBI)", plain[:8] + chunk(b"CgBI", bytes(4)) + plain[8:]
    yield "png 1 x 1", encoded(PICTURE.resize((1, 1)), "PNG")
    yield from _apng(plain)


def _apng(plain: bytes) -> Kinds:
    other = photograph(HEIGHT, WIDTH, 9)
    frames = {"save_all": True, "append_images": [other], "duration": 100}
    yield "apng, default image in the animation", encoded(PICTURE, "PNG", **frames)
    yield "apng, default image outside of it", encoded(PICTURE, "PNG", default_image=True, **frames)
    yield "apng, default image outside, RGBA", encoded(ALPHA, "PNG", default_image=True, **frames)
    control = chunk(b"acTL", (1).to_bytes(4, "big") + bytes(4))
    yield "apng of one frame without fcTL", png_with(plain, before=control)
    whole = b"".join(n.to_bytes(4, "big") for n in (0, WIDTH, HEIGHT, 0, 0)) + bytes([0, 1, 0, 10, 0, 0])
    yield "apng of one frame", png_with(plain, before=control + chunk(b"fcTL", whole))
    part = b"".join(n.to_bytes(4, "big") for n in (0, WIDTH // 2, HEIGHT // 2, 5, 5)) + bytes([0, 1, 0, 10, 0, 0])
    yield "apng whose first frame is a part", png_with(plain, before=control + chunk(b"fcTL", part))
    animated = encoded(PICTURE, "PNG", **frames)
    yield "apng, eXIf 6", png_with(animated, before=chunk(b"eXIf", exif(6)))
