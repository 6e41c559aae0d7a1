"""Inference preprocessing: agreement with DALI, decoding of what images come as, refusals."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from data_prep.image_check import UnusableImage, check_image
from models.preprocess import ImageError, Preprocessing, decode

ORIENTATION = 0x0112


def scene(height: int, width: int, seed: int = 0) -> Image.Image:
    """Something like a photograph: smooth areas, edges, texture, and detail up to the border."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int32)
    for _ in range(12):
        top, left = rng.integers(0, height), rng.integers(0, width)
        pixels[top : top + height // 4, left : left + width // 5] = rng.integers(0, 256, 3)
    pixels += rng.integers(-25, 26, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def dali(images: list[bytes], preprocessing: Preprocessing | None) -> list[npt.NDArray[Any]]:
    """The images through DALI on the CPU, as evaluation has it; decoded only, if there is no `preprocessing`."""

    @pipeline_def(batch_size=len(images), num_threads=1, device_id=None)  # type: ignore[untyped-decorator, unused-ignore]
    def graph() -> Any:
        data = fn.external_source(source=lambda: [np.frombuffer(image, np.uint8) for image in images])
        pixels = fn.decoders.image(data, device="cpu", output_type=types.RGB)
        if preprocessing is None:
            return pixels
        side = preprocessing.size
        squash = preprocessing.resize == "squash"
        target = {"size": [side, side]} if squash else {"resize_shorter": preprocessing.resize_to}
        pixels = fn.resize(pixels, interp_type=types.INTERP_LINEAR, antialias=True, **target)
        return fn.crop_mirror_normalize(
            pixels, dtype=types.FLOAT, output_layout="CHW", crop=(side, side), crop_pos_x=0.5, crop_pos_y=0.5,
            mean=[255 * v for v in preprocessing.mean], std=[255 * v for v in preprocessing.std],
        )  # fmt: skip

    pipeline = graph()
    pipeline.build()
    (result,) = pipeline.run()
    return [np.array(result.at(row)) for row in range(len(images))]


SIZES = [(375, 500), (500, 333), (356, 500), (768, 1024), (64, 64), (33, 91), (150, 200), (224, 224), (500, 359)]


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(224),
        Preprocessing(32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        Preprocessing(224, resize="shorter", resize_to=256),
        Preprocessing(225, resize="shorter", resize_to=256),
        Preprocessing(384, resize="shorter", resize_to=512),
        Preprocessing(64, resize="shorter", resize_to=64),
    ],
)
def test_pixels_are_dalis_within_one_level_of_255(preprocessing: Preprocessing):
    """Measured on 120 ImageNet photographs: never more than one level of 255, 0.08 to 0.18 on average."""
    images = [encoded(scene(height, width, seed), quality=90) for seed, (height, width) in enumerate(SIZES)]
    ours, theirs = preprocessing(images).numpy(), np.stack(dali(images, preprocessing))
    levels = np.abs(ours - theirs) * 255 * np.array(preprocessing.std).reshape(3, 1, 1)
    assert levels.max() < 1.01
    assert levels.mean() < 0.3


def test_decoding_is_dalis_bit_for_bit():
    image = scene(61, 90)
    alpha = image.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    files = {
        "gray JPEG": encoded(image.convert("L")),
        "CMYK JPEG": encoded(image.convert("CMYK"), quality=95),
        "4:4:4 JPEG": encoded(image, subsampling=0),
        "4:2:2 JPEG": encoded(image, subsampling=1),
        "progressive JPEG": encoded(image, progressive=True, quality=60),
        "gray PNG": encoded(image.convert("L"), "PNG"),
        "palette PNG": encoded(image.convert("P"), "PNG"),
        "palette PNG with transparency": encoded(image.convert("P"), "PNG", transparency=3),
        "RGBA PNG": encoded(alpha, "PNG"),
        "gray and alpha PNG": encoded(alpha.convert("LA"), "PNG"),
        "1-bit PNG": encoded(image.convert("1"), "PNG"),
        "WebP": encoded(image, "WEBP", quality=80),
        "RGBA WebP": encoded(alpha, "WEBP", lossless=True),
        "BMP": encoded(image, "BMP"),
        "palette BMP": encoded(image.convert("P"), "BMP"),
        "TIFF": encoded(image, "TIFF", compression="tiff_lzw"),
        "gray TIFF": encoded(image.convert("L"), "TIFF"),
        "RGBA TIFF": encoded(alpha, "TIFF"),
        "1-bit TIFF": encoded(image.convert("1"), "TIFF", compression="group4"),
    }
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        files[f"JPEG, orientation {orientation}"] = encoded(image, exif=exif)
        files[f"PNG, orientation {orientation}"] = encoded(image, "PNG", exif=exif)
    for (name, data), expected in zip(files.items(), dali(list(files.values()), None), strict=True):
        np.testing.assert_array_equal(decode(data), expected, err_msg=name)


def png_of_16_bits(pixels: npt.NDArray[np.uint16], colour_type: int) -> bytes:
    """Pillow writes no 16-bit colours."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize(("channels", "colour_type"), [(1, 0), (3, 2), (4, 6)])
def test_16_bits_are_rounded_as_dali_rounds_them(channels: int, colour_type: int):
    pixels = np.random.default_rng(0).integers(0, 65536, (32, 24, channels), np.uint16)
    data = png_of_16_bits(pixels, colour_type)
    assert check_image(data).extension == "png"
    np.testing.assert_array_equal(decode(data), dali([data], None)[0])
    np.testing.assert_array_equal(decode(data), np.broadcast_to(np.rint(pixels[..., :3] / 257), (32, 24, 3)))


def tiff(image: Image.Image) -> bytes:
    return encoded(image, "TIFF")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (png_of_16_bits(np.zeros((8, 8, 2), np.uint16), 4), "16-bit gray with alpha"),
        (tiff(scene(8, 8).convert("LA")), "LA, 8 . 8 bits"),
        (tiff(scene(8, 8).convert("P")), "P, 8 bits"),
        (tiff(scene(8, 8).convert("F")), "F, 32 bits"),
        (tiff(scene(8, 8).convert("CMYK")), "CMYK"),
    ],
)
def test_sharding_refuses_what_consumers_would_see_otherwise_than_training(data: bytes, kind: str):
    with pytest.raises(UnusableImage, match=kind):
        check_image(data)


def test_16_bits_become_8():
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    data = encoded(Image.fromarray(gray.astype(np.uint16) * 257), "PNG")
    np.testing.assert_array_equal(decode(data), np.stack([gray] * 3, axis=2))


def test_orientation_is_undone():
    upright = np.zeros((8, 24, 3), np.uint8)
    upright[:, 12:] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # stored turned left by a quarter, to be turned right
    stored = Image.fromarray(np.rot90(upright))
    np.testing.assert_array_equal(decode(encoded(stored, "PNG", exif=exif)), upright)


def test_arrays_are_taken_as_encoded_images_are():
    pixels = np.asarray(scene(40, 50))
    preprocessing = Preprocessing(32)
    expected = preprocessing([encoded(scene(40, 50), "PNG")])
    with_alpha = np.concatenate([pixels, pixels[:, :, :1]], axis=2)
    for array in (pixels, pixels[:, ::-1][:, ::-1], with_alpha):
        assert torch.equal(preprocessing([array]), expected)
    gray = pixels[:, :, 0]
    as_rgb = np.stack([gray] * 3, axis=2)
    assert torch.equal(preprocessing([gray, gray[:, :, None]]), preprocessing([as_rgb, as_rgb]))


@pytest.mark.parametrize("decoding", ["dali", "pillow"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "CMYK", "gray", "16 bits"])
def test_pillows_images_are_taken_as_the_files_they_come_from(kind: str, decoding: Any):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image, options = scene(40, 50), {"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}
    if kind in ("CMYK", "gray"):
        image, kind = image.convert({"CMYK": "CMYK", "gray": "L"}[kind]), "JPEG"
    elif kind == "16 bits":
        image, kind = Image.fromarray(np.arange(2000, dtype=np.uint16).reshape(40, 50) * 30), "PNG"
    data = encoded(image, kind, **options)
    opened = Image.open(io.BytesIO(data))
    expected = decode(data, decoding)
    for _ in range(2):  # nothing of it is changed
        np.testing.assert_array_equal(decode(opened, decoding), expected)
    if opened.mode == "RGB":
        np.testing.assert_array_equal(decode(opened.convert("RGB"), decoding), expected)
        np.testing.assert_array_equal(decode(Image.fromarray(expected), decoding), expected)


def test_normalisation():
    flat = np.full((4, 4, 3), [0, 51, 255], np.uint8)
    out = Preprocessing(2, mean=(0.5, 0.2, 0.0), std=(0.5, 0.25, 2.0))([flat, flat])
    assert out.shape == (2, 3, 2, 2)
    assert out.dtype == torch.float32
    assert out.is_contiguous()
    torch.testing.assert_close(out[1, :, 0, 0], torch.tensor([-1.0, 0.0, 0.5]))


def test_no_images_are_an_empty_batch():
    assert Preprocessing(16)([]).shape == (0, 3, 16, 16)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "image 1 of 2: 0 bytes that are no image"),
        (b"not an image", "image 1 of 2: 12 bytes that are no image"),
        (encoded(scene(64, 64))[:-700], "does not decode: .*truncated"),
        (encoded(scene(64, 64), "PNG")[:-700], "does not decode: "),
        (np.zeros((4, 4, 3), np.float32), "an array of float32: uint8"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \[3, 8, 8\]: \[height, width, 3\] is wanted"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"shape \[2, 4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \[0, 4, 3\]"),
        ("a/path.jpg", "not str"),
    ],
)
def test_what_is_no_image_is_refused_with_its_place(image: Any, message: str):
    good = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ImageError, match=message) as error:
        Preprocessing(8)([good, image])
    assert "image 1 of 2" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "size = 0"),
        ({"resize": "crop"}, "resize = 'crop' must be 'squash' or 'shorter'"),
        ({"resize_to": 256}, "resize_to = 256 goes with resize = 'shorter' only"),
        ({"resize": "shorter"}, "resize_to = None must be at least size = 224"),
        ({"resize": "shorter", "resize_to": 200}, "resize_to = 200 must be at least size = 224"),
        ({"interpolation": "lanczos"}, "interpolation = 'lanczos' must be 'bilinear' or 'bicubic'"),
        ({"antialias": 1}, "antialias = 1 must be true or false"),
        ({"crop": "center"}, "crop = 'center' must be 'exact' or 'torchvision'"),
        ({"mean": (0.5, 0.5)}, "mean = .* must be three numbers"),
        ({"std": (0.5, 0.5, 0.0)}, "std = .* must be above 0"),
        ({"gamma": 2}, "unknown preprocessing field.*gamma"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_json({"size": 224} | change)


def test_settings_survive_json():
    preprocessing = Preprocessing(224, resize="shorter", resize_to=256, mean=(0.1, 0.2, 0.3))
    assert Preprocessing.from_json(preprocessing.to_json()) == preprocessing
    with pytest.raises(ValueError, match="size"):
        Preprocessing.from_json({})
