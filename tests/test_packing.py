"""Packing: what images become, which are left out, what a limit keeps, and that no sitting of it is lost, whatever ends it."""
import errno
import gc
import io
import json
import os
import re
import shutil
import signal
import struct
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from torchvision.transforms import Resize

import data
import packing
from data import load_source, load_target
from files import UserError
from layout_files import (BLUE, GREEN, JPEG_TOLERANCE, RED, WHITE, as_nobody, assert_colour, expect_small, forks, leftovers, names_in, random_pixels,
                          save_image, save_images, shared_folder, start, write_caltech101, write_class_folders)


@pytest.fixture(autouse=True)
def small_data_sets(monkeypatch):
    expect_small(monkeypatch)


# --------------------------------------------------------------------------------------------------
# Decoding
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("width, height", [(8, 8), (31, 33), (64, 64), (96, 96), (300, 200), (200, 300), (17, 90), (500, 40), (1, 1)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decode_is_torchvision_resize_bit_for_bit(width, height, mode):
    image = Image.fromarray(random_pixels(height, width, 3)).convert(mode)
    expected = np.asarray(Resize((32, 32))(image.convert("RGB")))
    np.testing.assert_array_equal(packing.decode(image), expected)


@pytest.mark.parametrize("width, height", [(500, 375), (375, 500), (1600, 1200), (96, 96), (33, 31)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [32, 96])
def test_decode_of_a_photograph_is_torchvision_resize_bit_for_bit(tmp_path, width, height, mode, size):
    Image.fromarray(random_pixels(12, 16, 3)).resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(tmp_path / "photo.jpg", quality=90)
    expected = np.asarray(Resize((size, size))(Image.open(tmp_path / "photo.jpg").convert("RGB")))
    found = packing.decode(packing.ImageFiles(str(tmp_path), ["photo.jpg"])(0), size)
    np.testing.assert_array_equal(found, expected)


def test_decode_leaves_native_pixels_unchanged():
    pixels = random_pixels(32, 32, 3)
    np.testing.assert_array_equal(packing.decode(Image.fromarray(pixels)), pixels)


def test_decode_repeats_grey_in_all_three_colours():
    grey = random_pixels(32, 32)
    np.testing.assert_array_equal(packing.decode(Image.fromarray(grey)), np.stack([grey, grey, grey], axis=2))


def test_decode_looks_colours_of_a_palette_up():
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, *GREEN])
    assert_colour(packing.decode(image), GREEN)


# --------------------------------------------------------------------------------------------------
# Images that are odd, and those that are broken
# --------------------------------------------------------------------------------------------------

def filled(colour):
    return np.tile(np.array(colour, np.uint8), (32, 32, 1))


def saved(image, kind, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def png(width, height, depth, colour_type, rows, *chunks):
    """A PNG written by hand. rows: bytes of each, without the filter's; chunks: (kind, content) before the pixels."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    squeeze, pixels = zlib.compressobj(), []
    for row in rows:
        pixels.append(squeeze.compress(b"\0" + row))
    pixels.append(squeeze.flush())
    head = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in ((b"IHDR", head), *chunks, (b"IDAT", b"".join(pixels)), (b"IEND", b"")))


def huge_png(width, height):
    """One colour, a bit a pixel."""
    return png(width, height, 1, 0, (bytes(width // 8) for _ in range(height)))


def cut(content, share=0.5):
    return content[:int(len(content) * share)]


def halves(top, bottom):
    pixels = filled(top)
    pixels[16:] = bottom
    return pixels


def in_palette(alpha):
    """Left half opaque red, right half green of this alpha."""
    image = Image.fromarray(np.repeat(np.array([[0] * 16 + [1] * 16], np.uint8), 32, axis=0))
    image = image.convert("P")
    image.putpalette([*RED, *GREEN])
    return saved(image, "PNG", transparency=bytes([255, alpha]))


def side_by_side(left, right):
    return halves(left, right).transpose(1, 0, 2)


def with_alpha(mode, alpha):
    image = Image.new(mode, (32, 32), (*RED, alpha) if mode == "RGBA" else (RED[0], alpha))
    return saved(image, "PNG")


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


def photo(pixels=None):
    return Image.fromarray(np.kron(random_pixels(8, 8, 3), np.ones((4, 4, 1), np.uint8)) if pixels is None else pixels)


def animated(kind, **kwargs):
    first, *others = [Image.new("RGB", (32, 32), colour) for colour in (RED, GREEN, BLUE)]
    return saved(first, kind, save_all=True, append_images=others, **kwargs)


def rows_of_16_bits(pixels):
    return [row.astype(">u2").tobytes() for row in pixels]


WIDE = np.random.default_rng(1).integers(0, 65536, (32, 32, 3))
GREY = WIDE[..., 0]
UPPER_GREY = np.repeat((GREY[..., None] >> 8).astype(np.uint8), 3, axis=2)
NOISE = random_pixels(32, 32, 3)
HALF_ON_WHITE = [round(255 * 127 / 255 + value * 128 / 255) for value in RED]

# what it is: (file name, its content, the pixels that become of it, how far they may be off)
READ = {
    "JPEG of CMYK": ("a.jpg", lambda: saved(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG"), filled((255, 0, 0)), JPEG_TOLERANCE),
    "JPEG in grey": ("a.jpg", lambda: saved(Image.new("L", (32, 32), 77), "JPEG"), filled((77, 77, 77)), JPEG_TOLERANCE),
    "JPEG, progressive": ("a.jpg", lambda: saved(Image.new("RGB", (32, 32), RED), "JPEG", progressive=True), filled(RED), JPEG_TOLERANCE),
    "JPEG of several pictures": ("a.jpg", lambda: animated("MPO"), filled(RED), JPEG_TOLERANCE),
    "JPEG named .png": ("a.png", lambda: saved(Image.new("RGB", (32, 32), RED), "JPEG"), filled(RED), JPEG_TOLERANCE),
    "JPEG turned by its EXIF": ("a.jpg", lambda: saved(photo(side_by_side(RED, GREEN)), "JPEG", exif=exif_of(6), quality=95, subsampling=0),
                                halves(RED, GREEN), JPEG_TOLERANCE),
    "JPEG of a broken EXIF": ("a.jpg", lambda: saved(Image.new("RGB", (32, 32), RED), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken"),
                              filled(RED), JPEG_TOLERANCE),
    "JPEG of an EXIF without sense": ("a.jpg", lambda: saved(Image.new("RGB", (32, 32), RED), "JPEG", exif=exif_of(99)), filled(RED), JPEG_TOLERANCE),
    "PNG turned by its EXIF": ("a.png", lambda: saved(photo(NOISE), "PNG", exif=exif_of(6)), np.rot90(NOISE, -1), 0),
    "PNG, 16 bits of grey": ("a.png", lambda: png(32, 32, 16, 0, rows_of_16_bits(GREY)), UPPER_GREY, 0),
    "PNG, 16 bits of each colour": ("a.png", lambda: png(32, 32, 16, 2, rows_of_16_bits(WIDE)), (WIDE >> 8).astype(np.uint8), 0),
    "PNG, 1 bit": ("a.png", lambda: saved(Image.fromarray(halves(0, 255)[..., 0]).convert("1"), "PNG"), halves(0, 255), 0),
    "PNG in a palette with transparency": ("a.png", lambda: in_palette(0), side_by_side(RED, (255, 255, 255)), 0),
    "PNG in a palette without transparency": ("a.png", lambda: in_palette(255), side_by_side(RED, GREEN), 0),
    "PNG of RGBA, transparent": ("a.png", lambda: with_alpha("RGBA", 0), filled((255, 255, 255)), 0),
    "PNG of RGBA, half transparent": ("a.png", lambda: with_alpha("RGBA", 128), filled(HALF_ON_WHITE), 1),
    "PNG of RGBA, opaque": ("a.png", lambda: with_alpha("RGBA", 255), filled(RED), 0),
    "PNG of LA, transparent": ("a.png", lambda: with_alpha("LA", 0), filled((255, 255, 255)), 0),
    "PNG of LA, half transparent": ("a.png", lambda: with_alpha("LA", 128), filled([HALF_ON_WHITE[0]] * 3), 1),
    "PNG of RGB with a transparent colour": ("a.png", lambda: saved(Image.fromarray(side_by_side(RED, GREEN)), "PNG", transparency=GREEN),
                                             side_by_side(RED, (255, 255, 255)), 0),
    "PNG of grey with a transparent value": ("a.png", lambda: saved(Image.fromarray(halves(10, 200)[..., 0]), "PNG", transparency=10), halves(255, 200), 0),
    "PNG with a check sum of zero in a comment": ("a.png", lambda: png(32, 32, 8, 2, [row.tobytes() for row in NOISE]).replace(
        b"\0\0\0\0IEND", b"\0\0\0\4tEXtabcd\0\0\0\0" + b"\0\0\0\0IEND"), NOISE, 0),
    "GIF with transparency": ("a.gif", lambda: saved(Image.fromarray(np.full((32, 32), 1, np.uint8)).convert("P"), "GIF", transparency=1),
                              filled((255, 255, 255)), 0),
    "GIF, animated": ("a.gif", lambda: animated("GIF"), filled(RED), 0),
    "PNG, animated": ("a.png", lambda: animated("PNG"), filled(RED), 0),
    "WebP": ("a.webp", lambda: saved(photo(NOISE), "WEBP", lossless=True), NOISE, 0),
    "WebP, animated": ("a.webp", lambda: animated("WEBP", lossless=True), filled(RED), 0),
    "TIFF, 16 bits, the upper byte first": ("a.tif", lambda: saved(Image.fromarray(GREY.astype(">u2")), "TIFF"), UPPER_GREY, 0),
    "TIFF turned by its tag": ("a.tif", lambda: saved(photo(NOISE), "TIFF", exif=exif_of(6)), np.rot90(NOISE, -1), 0),
    "TIFF of several pages": ("a.tiff", lambda: animated("TIFF"), filled(RED), 0),
    "PPM as text": ("a.ppm", lambda: b"P3 1 1 255 250 10 10", filled(RED), 0),
    "PGM of 16 bits": ("a.pgm", lambda: b"P5 32 32 65535\n" + GREY.astype(">u2").tobytes(), UPPER_GREY, 0),
    "BMP": ("a.bmp", lambda: saved(photo(NOISE), "BMP"), NOISE, 0),
    "1x1": ("a.png", lambda: saved(Image.new("RGB", (1, 1), RED), "PNG"), filled(RED), 0),
    "1x9000": ("a.png", lambda: saved(Image.new("RGB", (1, 9000), RED), "PNG"), filled(RED), 0),
}

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n(run) (w) file closefile\nshowpage\n%%EOF\n"
NO_IMAGE = "no JPEG, PNG, WEBP, BMP, GIF, PPM or TIFF"

# what it is: (file name, its content, the reason in bad.txt, as a regular expression)
BROKEN = {
    "of zero bytes": ("a.jpg", lambda: b"", "empty"),
    "JPEG cut short": ("a.jpg", lambda: cut(saved(photo(random_pixels(300, 300, 3)), "JPEG")), "image file is truncated.*"),
    "JPEG cut short in its head": ("a.jpg", lambda: saved(photo(), "JPEG")[:100], ".+"),
    "PNG cut short": ("a.png", lambda: cut(saved(photo(random_pixels(64, 64, 3)), "PNG")), "image file is truncated.*"),
    "PNG with other bytes in it": ("a.png", lambda: cut(saved(photo(NOISE), "PNG"), 0.9) + bytes(400), ".+"),
    "GIF cut short": ("a.gif", lambda: cut(saved(photo(NOISE), "GIF"), 0.9), ".+"),
    "WebP cut short": ("a.webp", lambda: cut(saved(photo(NOISE), "WEBP", lossless=True)), ".+"),
    "TIFF cut short": ("a.tif", lambda: cut(saved(photo(NOISE), "TIFF", compression="tiff_lzw"), 0.9), ".+"),
    "BMP cut short": ("a.bmp", lambda: cut(saved(photo(NOISE), "BMP")), "image file is truncated.*"),
    "20000x20000 in a few kilobytes": ("a.png", lambda: huge_png(20_000, 20_000), ".*400000000 pixels.*"),
    "just above the number of pixels": ("a.png", lambda: huge_png(9_464, 9_456), "9464x9456 pixels are more than 89,478,485"),
    "a text": ("a.jpg", lambda: b"not an image\n", NO_IMAGE),
    "a web page": ("a.png", lambda: b"<!DOCTYPE html><html><body>404</body></html>", NO_IMAGE),
    "EPS": ("a.jpg", lambda: EPS, NO_IMAGE),
    "EPS made on Windows": ("a.png", lambda: struct.pack("<IIIIIIIH", 0xC6D3D0C5, 32, len(EPS), 0, 0, 0, 0, 0xFFFF) + bytes(2) + EPS, NO_IMAGE),
    "a drawing": ("a.png", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><rect width='9' height='9'/></svg>", NO_IMAGE),
    "an icon": ("a.png", lambda: saved(Image.new("RGB", (32, 32)), "ICO"), NO_IMAGE),
    "TIFF of floating point": ("a.tif", lambda: saved(Image.fromarray(np.ones((32, 32), np.float32)), "TIFF"), "floating-point pixels have no fixed range"),
    "TIFF of 32 bits": ("a.tif", lambda: saved(Image.fromarray(np.full((32, 32), 1 << 20, np.int32)), "TIFF"), "32-bit pixels have no fixed range"),
}


def add_good_one(folder):
    """An image after all the others, so that a pack is made."""
    save_image(folder / "zzz.png", BLUE)


def listed(data_dir):
    """The lines of the only bad.txt: [file, reason, number]."""
    [listing] = (data_dir / "packed").glob("*/bad.txt")
    return [line.split("\t") for line in os.fsdecode(listing.read_bytes()).removesuffix("\n").split("\n")]


def pack_odd(folder):
    """Packs `folder`/pictures, however many of it are bad."""
    return load_source(f"odd={folder / 'pictures'}", folder / "data", max_bad=1.0)


def assert_one_line(captured, folder, bad, count):
    """What packing has said is this and nothing else."""
    assert captured.err == ""
    assert re.fullmatch(rf"odd: {bad} of {count} images can't be read and are left out, see {re.escape(str(folder))}/data/packed/.*/bad\.txt\n", captured.out)


@pytest.mark.parametrize("name, content, expected, tolerance", READ.values(), ids=READ)
def test_an_odd_image_is_read_as_a_viewer_shows_it(tmp_path, capfd, recwarn, name, content, expected, tolerance):
    if name.endswith(".webp") and not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / name).write_bytes(content())
    source = pack_odd(tmp_path)
    assert source.bad == 0 and source.files == [name]
    assert_colour(source.images[0], expected, tolerance)
    assert capfd.readouterr() == ("", "") and not recwarn.list


@pytest.mark.parametrize("name, content, reason", BROKEN.values(), ids=BROKEN)
def test_a_broken_image_is_left_out_and_listed_with_its_reason(tmp_path, capfd, recwarn, name, content, reason):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / name).write_bytes(content())
    add_good_one(tmp_path / "pictures")
    source = pack_odd(tmp_path)
    assert source.bad == 1 and source.files == ["zzz.png"] and source.rows.tolist() == [1]
    assert_colour(source.images[0], BLUE)
    [[file, said, number]] = listed(tmp_path / "data")
    assert (file, number) == (name, "0")
    assert re.fullmatch(reason, said)
    assert_one_line(capfd.readouterr(), tmp_path, 1, 2)
    assert not recwarn.list


def test_a_truncated_image_is_not_filled_with_grey(tmp_path):
    """Pillow's LOAD_TRUNCATED_IMAGES, were it set, would do that."""
    save_image(tmp_path / "pictures" / "a.jpg", RED, (300, 300))
    whole = (tmp_path / "pictures" / "a.jpg").read_bytes()
    for size in range(len(whole) - 400, len(whole) - 10, 60):
        (tmp_path / "pictures" / "a.jpg").write_bytes(whole[:size])
        add_good_one(tmp_path / "pictures")
        assert pack_odd(tmp_path).files == ["zzz.png"]


def test_postscript_is_never_interpreted(tmp_path, monkeypatch):
    """An interpreter first in the path would leave a trace."""
    (tmp_path / "bin").mkdir()
    for name in ("gs", "gswin32c", "gswin64c"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/run\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(EPS)
    add_good_one(tmp_path / "pictures")
    assert pack_odd(tmp_path).bad == 1
    assert not (tmp_path / "run").exists()


def test_the_largest_number_of_pixels_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MAX_PIXELS", 1000)
    save_image(tmp_path / "pictures" / "at.png", RED, (20, 50))
    save_image(tmp_path / "pictures" / "below.png", RED, (27, 37))
    save_image(tmp_path / "pictures" / "over.png", RED, (7, 143))
    assert pack_odd(tmp_path).files == ["at.png", "below.png"]


def dangling(path):
    path.symlink_to("nowhere.jpg")


def looping(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize("make, reason", [(dangling, "No such file or directory"), (looping, "Too many levels of symbolic links"),
                                          (os.mkfifo, "no regular file")],
                         ids=["a link to nowhere", "a link to itself", "a pipe"])
def test_what_is_no_file_is_left_out_and_listed(tmp_path, capfd, make, reason):
    add_good_one(tmp_path / "pictures")
    make(tmp_path / "pictures" / "a.jpg")

    def late(*_):
        pytest.fail("it waits for something")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    try:
        assert pack_odd(tmp_path).files == ["zzz.png"]
    finally:
        signal.alarm(0)
    assert listed(tmp_path / "data") == [["a.jpg", reason, "0"]]
    assert_one_line(capfd.readouterr(), tmp_path, 1, 2)


def test_a_link_to_an_image_is_read(tmp_path):
    save_image(tmp_path / "elsewhere.png", RED)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").symlink_to(tmp_path / "elsewhere.png")
    assert_colour(pack_odd(tmp_path).images[0], RED)


def test_a_folder_with_the_name_of_an_image_is_a_folder(tmp_path, capfd):
    save_image(tmp_path / "pictures" / "x.jpg" / "inner.png", RED)
    (tmp_path / "pictures" / "y.jpg").mkdir()
    assert pack_odd(tmp_path).files == ["x.jpg/inner.png"]
    assert capfd.readouterr() == ("", "")


@forks
def test_a_file_that_may_not_be_read_is_left_out_and_listed():
    with shared_folder() as folder:
        add_good_one(folder / "pictures")
        save_image(folder / "pictures" / "a.jpg", RED)
        (folder / "pictures" / "a.jpg").chmod(0)
        (folder / "data").mkdir()
        (folder / "data").chmod(0o777)
        assert as_nobody(pack_odd, folder).files == ["zzz.png"]
        assert listed(folder / "data") == [["a.jpg", "Permission denied", "0"]]


@forks
def test_a_folder_that_may_not_be_read_counts_as_an_image_that_can_not():
    with shared_folder() as folder:
        add_good_one(folder / "pictures")
        save_image(folder / "pictures" / "closed" / "a.jpg", RED)
        (folder / "pictures" / "closed").chmod(0)
        (folder / "data").mkdir()
        (folder / "data").chmod(0o777)
        assert as_nobody(pack_odd, folder).files == ["zzz.png"]
        assert listed(folder / "data") == [["closed", "a folder that can't be read", "0"]]


NAMES = ["中文.png", "صورة.png", "🐱.png", "with space.png", " .png", "new\nline.png", "tab\there.png", "carriage\rreturn.png", "quote'\".png",
         "-rf.png", "a\\tb.png",
         "line\u2028separator.png", "next\x85line.png", "percent%s{}.png", "*.png", os.fsdecode(b"latin-\xe9.png"), os.fsdecode(b"\xff\xfe.png")]


def make_named(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / name).write_bytes(content)
    except OSError:
        pytest.skip("this file system has no such names")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_an_image_of_any_name_is_read(tmp_path, capfd, name):
    make_named(tmp_path / "pictures", name, saved(photo(NOISE), "PNG"))
    for _ in range(2):      # made, and opened again
        source = pack_odd(tmp_path)
        assert source.files == [name]
        np.testing.assert_array_equal(source.images[0], NOISE)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_broken_image_of_any_name_is_one_line_of_the_listing(tmp_path, capfd, name):
    make_named(tmp_path / "pictures", name, b"not an image")
    add_good_one(tmp_path / "pictures")
    assert pack_odd(tmp_path).files == ["zzz.png"]
    escaped = "".join(repr(sign)[1:-1] if sign in "\t\n\r\x85\u2028" else sign for sign in name)
    assert listed(tmp_path / "data") == [[escaped, NO_IMAGE, str(sorted(["zzz.png", name]).index(name))]]
    assert_one_line(capfd.readouterr(), tmp_path, 1, 2)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_too_many_broken_images_of_any_name_are_one_line(tmp_path, name):
    make_named(tmp_path / "pictures", name, b"not an image")
    with pytest.raises(UserError) as refusal:
        load_source(f"odd={tmp_path / 'pictures'}", tmp_path / "data")
    assert len(str(refusal.value).splitlines()) == 1
    assert str(refusal.value).encode("utf-8", "surrogateescape")


@pytest.mark.parametrize("error", [ValueError("one\ttwo\nthree"), SyntaxError("one\ttwo\nthree"), OSError("one\ttwo\rthree"), MemoryError()], ids=repr)
def test_a_reason_is_one_field_whatever_the_decoder_says(tmp_path, error):
    def read(i):
        if i == 0:
            raise error
        return Image.new("RGB", (8, 8))

    packing.pack(packing.Images(2, read, "two"), tmp_path / "packed" / "two", "two", max_bad=1.0)
    [[file, reason, number]] = listed(tmp_path)
    assert (file, number) == ("0", "0") and reason.strip() and "three" not in reason


# --------------------------------------------------------------------------------------------------
# Packing
# --------------------------------------------------------------------------------------------------

def pack_of(data_dir):
    [pack] = [data_dir / "packed" / name for name in names_in(data_dir / "packed")]
    return pack


def test_a_second_load_does_not_decode_again(tmp_path):
    write_class_folders(tmp_path / "pictures")
    load_source(f"mine={tmp_path / 'pictures'}", tmp_path / "data")
    first = (pack_of(tmp_path / "data") / "images.npy").stat().st_mtime_ns
    load_source(f"mine={tmp_path / 'pictures'}", tmp_path / "data")
    assert (pack_of(tmp_path / "data") / "images.npy").stat().st_mtime_ns == first


def test_a_changed_file_is_packed_anew(tmp_path):
    save_images(tmp_path / "pictures", ["a.bmp", "b.bmp"], RED)
    load_source(f"mine={tmp_path / 'pictures'}", tmp_path / "data")
    save_image(tmp_path / "pictures" / "b.bmp", GREEN)      # of the same size in bytes
    os.utime(tmp_path / "pictures" / "b.bmp", (1, 1))
    images = load_source(f"mine={tmp_path / 'pictures'}", tmp_path / "data").images
    assert_colour(images[0], RED)
    assert_colour(images[1], GREEN)
    assert not leftovers(tmp_path)


def test_an_added_file_is_packed_anew(tmp_path):
    save_images(tmp_path / "pictures", ["b.png"], RED)
    load_source(f"mine={tmp_path / 'pictures'}", tmp_path / "data")
    save_image(tmp_path / "pictures" / "a.png", GREEN)
    source = load_source(f"mine={tmp_path / 'pictures'}", tmp_path / "data")
    assert source.files == ["a.png", "b.png"]
    assert_colour(source.images[0], GREEN)


def test_limit_spaces_the_images_evenly_over_the_whole_set(tmp_path):
    for i in range(11):
        save_image(tmp_path / "pictures" / f"{i:02d}.png", 20 * i)
    source = load_source(f"mine={tmp_path / 'pictures'}", tmp_path / "data", limit=3)
    assert source.rows.tolist() == [0, 5, 10]
    assert source.files == ["00.png", "05.png", "10.png"]
    assert source.images[:, 0, 0, 0].tolist() == [0, 100, 200]


def test_limit_keeps_every_class_of_a_target_and_the_labels_of_its_rows(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b", "c", "d"):
            save_images(tmp_path / "mine" / split, [f"{name}/{i}.png" for i in range(5)])
    target = load_target(f"mine={tmp_path / 'mine'}", tmp_path / "data", limit=8)
    assert len(target.train) == len(target.test) == 8
    assert set(target.train.labels) == {0, 1, 2, 3}
    assert target.train.labels.tolist() == [row // 5 for row in target.train.rows]


def test_limit_counts_rows_in_the_whole_set_where_a_split_takes_every_fifth(tmp_path):
    write_caltech101(tmp_path)
    target = load_target("caltech101", tmp_path, limit=2)
    assert target.train.rows.tolist() == [0, 11] and target.test.rows.tolist() == [4, 10]


def test_a_limit_above_the_size_is_the_whole_set(tmp_path):
    save_images(tmp_path / "pictures", ["a.png", "b.png"])
    assert load_source(f"mine={tmp_path / 'pictures'}", tmp_path / "data", limit=100).rows.tolist() == [0, 1]


def write_hundred(root, broken):
    for i in range(100):
        save_image(root / "train" / f"class{i // 50}" / f"{i:03d}.png", i)
    for i in broken:
        (root / "train" / f"class{i // 50}" / f"{i:03d}.png").write_bytes(b"not an image")
    for name in ("class0", "class1"):
        save_image(root / "test" / name / "t.png")


def test_a_broken_file_in_a_hundred_is_left_out_and_listed(tmp_path):
    write_hundred(tmp_path / "mine", broken=[10])
    train = load_target(f"mine={tmp_path / 'mine'}", tmp_path / "data").train
    kept = [i for i in range(100) if i != 10]
    assert train.rows.tolist() == kept
    assert train.images[:, 31, 31, 0].tolist() == kept
    assert train.labels.tolist() == [i // 50 for i in kept]
    assert train.files == [f"class{i // 50}/{i:03d}.png" for i in kept]
    assert listed(tmp_path / "data") == [["class0/010.png", NO_IMAGE, "10"]]
    assert not leftovers(tmp_path)


def test_an_image_cut_short_is_left_out_too(tmp_path):
    write_hundred(tmp_path / "mine", broken=[])
    whole = tmp_path / "mine" / "train" / "class0" / "007.png"
    Image.fromarray(random_pixels(64, 64, 3)).save(whole)
    whole.write_bytes(whole.read_bytes()[:6000])
    assert 7 not in load_source(f"mine={tmp_path / 'mine' / 'train'}", tmp_path / "data").rows


def test_two_broken_files_in_a_hundred_are_a_user_error_and_leave_what_was_decoded(tmp_path):
    write_hundred(tmp_path / "mine", broken=[3, 50])
    with pytest.raises(UserError, match="2 of 100.*003.png"):
        load_source(f"mine={tmp_path / 'mine' / 'train'}", tmp_path / "data")
    [part] = names_in(tmp_path / "data" / "packed")
    assert part.endswith(".part")
    assert [line[0] for line in listed(tmp_path / "data")] == ["class0/003.png", "class1/050.png"]


def test_packing_in_blocks_loses_no_image(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "BLOCK", 1)        # which makes them of 16 images
    images = packing.Images(50, lambda i: Image.new("RGB", (4, 4), (i, 0, 0)) if i % 20 != 4 else 1 / 0, "fifty")
    packed = packing.pack(images, tmp_path / "pack", "fifty", max_bad=0.1)
    kept = [i for i in range(50) if i % 20 != 4]
    assert packed.images[:, 0, 0, 0].tolist() == packed.rows.tolist() == kept


def test_a_pack_can_be_written_to_in_memory_without_changing_the_file(tmp_path):
    save_images(tmp_path / "pictures", ["a.png"], RED)
    load_source(f"mine={tmp_path / 'pictures'}", tmp_path / "data").images[:] = 0
    assert_colour(load_source(f"mine={tmp_path / 'pictures'}", tmp_path / "data").images[0], RED)


# --------------------------------------------------------------------------------------------------
# How many may be bad
# --------------------------------------------------------------------------------------------------

class Counted:
    """Images in memory, the i-th of the grey `i % 251`; those in `bad` can't be read. `reads`: which have been, in this process."""

    def __init__(self, count, bad=(), made_from="counted"):
        self.bad, self.reads = set(bad), []
        self.images = packing.Images(count, self.read, made_from, np.arange(count) % 7, [f"class{i}" for i in range(7)], [f"{i:04}.png" for i in range(count)])

    def read(self, i):
        self.reads.append(i)
        if i in self.bad:
            raise ValueError("bad")
        return Image.new("L", (8, 8), i % 251)

    def pack(self, folder, **kwargs):
        self.reads.clear()
        return packing.pack(self.images, folder / "counted", "counted", **kwargs)


@pytest.mark.parametrize("bad, max_bad", [(1, 0.02), (2, 0.02), (0, 0.0), (7, 0.07), (29, 0.29), (57, 0.57), (58, 0.58), (99, 1.0)])
def test_up_to_the_share_of_max_bad_images_are_left_out(tmp_path, bad, max_bad):
    packed = Counted(100, range(bad)).pack(tmp_path, max_bad=max_bad)
    assert (len(packed), packed.bad) == (100 - bad, bad)


@pytest.mark.parametrize("bad, max_bad, share", [(1, 0.0, "0.0[12]"), (3, 0.02, "0.0[34]"), (1, 0.0099, "0.0[12]"), (40, 0.3, "0.4[01]"),
                                                 (99, 0.5, "0.99|1.00")])
def test_above_it_the_line_names_the_first_file_the_listing_and_the_share_that_would_do(tmp_path, bad, max_bad, share):
    counted = Counted(100, range(5, 5 + bad)) if bad < 90 else Counted(100, range(1, 100))
    with pytest.raises(UserError) as refusal:
        counted.pack(tmp_path, max_bad=max_bad)
    first = "0005.png" if bad < 90 else "0001.png"
    found = re.fullmatch(rf"counted: {bad} of 100 images can't be read, more than {max_bad:g} of all; the first is {first} \(bad\), "
                         rf"all are in {tmp_path}/counted.part/bad.txt; --max-bad (\S+) would leave them out", str(refusal.value))
    assert found and re.fullmatch(share, found[1])
    assert counted.pack(tmp_path, max_bad=float(found[1])).bad == bad


@pytest.mark.parametrize("bad", [3, 7, 14, 28, 29, 35, 55, 56, 57, 58])
def test_the_share_that_would_do_does(tmp_path, bad):
    counted = Counted(100, range(bad))
    with pytest.raises(UserError) as refusal:
        counted.pack(tmp_path)
    assert counted.pack(tmp_path, max_bad=float(re.search(r"--max-bad (\S+)", str(refusal.value))[1])).bad == bad


def test_with_a_larger_share_it_goes_on_without_decoding_again(tmp_path):
    counted = Counted(300, range(0, 300, 50))
    with pytest.raises(UserError):
        counted.pack(tmp_path)
    assert len(counted.reads) == 300
    packed = counted.pack(tmp_path, max_bad=0.05)
    assert counted.reads == []
    assert packed.rows.tolist() == [i for i in range(300) if i % 50]
    assert packed.images[:, 0, 0, 0].tolist() == [i % 251 for i in range(300) if i % 50]
    assert names_in(tmp_path) == ["counted"]


def test_with_a_smaller_share_a_finished_pack_is_an_error_again_and_stays(tmp_path):
    counted = Counted(300, range(0, 300, 50))
    counted.pack(tmp_path, max_bad=0.05)
    complaint = rf"6 of 300 images can't be read, more than 0.01 of all; the first is 0000.png \(bad\), all are in {tmp_path}/counted/bad.txt"
    with pytest.raises(UserError, match=complaint):
        counted.pack(tmp_path)
    assert counted.reads == []
    assert counted.pack(tmp_path, max_bad=0.05).bad == 6 and counted.reads == []


def test_images_of_which_none_can_be_read_are_refused(tmp_path):
    with pytest.raises(UserError, match=f"none of 20 images can be read, see {tmp_path}/counted.part/bad.txt"):
        Counted(20, range(20)).pack(tmp_path, max_bad=1.0)


def test_a_pack_without_bad_images_has_no_listing_and_says_nothing(tmp_path, capsys):
    Counted(20).pack(tmp_path)
    assert names_in(tmp_path / "counted") == ["files.jsonl", "images.npy", "labels.npy", "pack.json", "rows.npy"]
    assert capsys.readouterr().out == ""


def test_every_load_says_in_a_line_how_many_were_left_out(tmp_path, capsys):
    for _ in range(2):
        Counted(3000, (5, 6)).pack(tmp_path)
        assert capsys.readouterr().out == f"counted: 2 of 3,000 images can't be read and are left out, see {tmp_path}/counted/bad.txt\n"


def test_the_summary_of_the_command_says_how_many_were_left_out(tmp_path, execute):
    write_hundred(tmp_path / "mine", broken=[10])
    status, out, err = execute(data.main, [f"mine={tmp_path / 'mine' / 'train'}", "--data-dir", str(tmp_path / "data")], program="data.py")
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == "mine: 99 images packed, 1 left out"


# --------------------------------------------------------------------------------------------------
# Going on
# --------------------------------------------------------------------------------------------------

BAD = (3, 40, 41, 55, 90)


@pytest.fixture
def in_small_steps(monkeypatch):
    """Blocks of 16 images, each of which is saved, in one process; no disk has to be waited for, since it is no power cut."""
    monkeypatch.setattr(packing, "BLOCK", 1)
    monkeypatch.setattr(packing, "SAVE_INTERVAL", 0.0)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(packing, "cores", lambda: 0)


def contents(folder):
    """{name: bytes} of all that is in a pack."""
    return {name: (folder / name).read_bytes() for name in names_in(folder)}


def undisturbed(folder, count=100, bad=BAD, **kwargs):
    """The contents of the pack that nothing has interrupted."""
    Counted(count, bad, **kwargs).pack(folder / "undisturbed", max_bad=0.5)
    return contents(folder / "undisturbed" / "counted")


def interrupted_at(number, folder, count=100, bad=BAD, **kwargs):
    """A pack that ended when this image was read. Returns how many are saved."""
    counted = Counted(count, bad, **kwargs)
    read = counted.read

    def interrupt(i):
        if i == number:
            raise KeyboardInterrupt
        return read(i)

    counted.images = packing.Images(count, interrupt, counted.images.made_from, counted.images.labels, counted.images.classes, counted.images.files)
    with pytest.raises(KeyboardInterrupt):
        counted.pack(folder, max_bad=0.5)
    return json.loads((folder / "counted.part" / "progress.json").read_text())["done"]


@pytest.mark.parametrize("number", [16, 31, 50, 99])
def test_an_interrupted_pack_goes_on_and_is_the_same_to_the_bit(tmp_path, in_small_steps, number):
    done, counted = interrupted_at(number, tmp_path), Counted(100, BAD)
    packed = counted.pack(tmp_path, max_bad=0.5)
    assert done == number // 16 * 16
    assert counted.reads == list(range(done, 100))
    assert contents(tmp_path / "counted") == undisturbed(tmp_path)
    assert packed.images[:, 0, 0, 0].tolist() == packed.rows.tolist() == [i for i in range(100) if i not in BAD]
    assert names_in(tmp_path) == ["counted", "undisturbed"]


def read_slowly(counted, log, seconds):
    """Images of which each takes a while, and writes its number into `log` beforehand."""
    def read(i):
        with open(log, "a") as numbers:
            numbers.write(f"{i}\n")
        time.sleep(seconds)
        return counted.read(i)

    whole = counted.images
    return packing.Images(whole.count, read, whole.made_from, whole.labels, whole.classes, whole.files)


def numbers_in(log):
    return [int(line) for line in log.read_text().split()]


@forks
def test_a_killed_pack_goes_on_from_where_it_was_saved_last(tmp_path, in_small_steps, monkeypatch):
    monkeypatch.setattr(packing, "SAVE_INTERVAL", 0.1)
    counted, log, part = Counted(400, BAD), tmp_path / "log", tmp_path / "counted.part"
    log.touch()
    process = start(partial(packing.pack, read_slowly(counted, log, 0.003), tmp_path / "counted", "counted", max_bad=0.5))
    while len(numbers_in(log)) < 250:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    done, before = json.loads((part / "progress.json").read_text())["done"], len(numbers_in(log))
    counted.pack(tmp_path, max_bad=0.5)
    assert counted.reads == list(range(done, 400))
    assert before - done < 150      # a tenth of a second of it, and what a slow disk takes to save
    assert contents(tmp_path / "counted") == undisturbed(tmp_path, 400)


def still_runs(process_id):
    """Whether there is such a process, and not only its exit status."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@forks
def test_a_killed_pack_leaves_no_process_behind(tmp_path, in_small_steps, monkeypatch):
    monkeypatch.setattr(packing, "cores", lambda: 2)
    (tmp_path / "readers").mkdir()

    def read(i):
        (tmp_path / "readers" / str(os.getpid())).touch()
        time.sleep(0.01)
        return Image.new("RGB", (8, 8))

    process = start(partial(packing.pack, packing.Images(4000, read, "slow"), tmp_path / "slow", "slow"))
    while len(names_in(tmp_path / "readers")) < 2:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    patience = time.monotonic() + 2
    while any(map(still_runs, names_in(tmp_path / "readers"))) and time.monotonic() < patience:
        time.sleep(0.01)
    assert not [reader for reader in names_in(tmp_path / "readers") if still_runs(reader)]


def pack_until_step(number, folder):
    """Kills itself when a file or a folder would be moved, cut, deleted or brought to the disk for the `number`-th time."""
    left = number

    def step(call, *args, **kwargs):
        nonlocal left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return call(*args, **kwargs)

    for name in ("replace", "fsync", "unlink", "rmdir", "truncate"):
        setattr(os, name, partial(step, getattr(os, name)))
    Counted(100, BAD).pack(folder, max_bad=0.5)


def saved_in(folder):
    """How many of the hundred images need not be decoded again."""
    for meta in (folder / "counted.part" / "pack.json", folder / "counted" / "pack.json"):
        if meta.exists() and json.loads(meta.read_text())["made_from"] == "counted":
            return 100
    progress = folder / "counted.part" / "progress.json"
    return json.loads(progress.read_text())["done"] if progress.exists() else 0


@forks
@pytest.mark.parametrize("replacing", [False, True], ids=["a new pack", "a pack of changed files"])
def test_whatever_step_a_pack_is_killed_at_the_next_one_completes_it(tmp_path, in_small_steps, replacing):
    expected, number = undisturbed(tmp_path), 0
    while True:
        folder, counted = tmp_path / f"killed{number}", Counted(100, BAD)
        if replacing:
            Counted(70, (5,), "an earlier state").pack(folder, max_bad=0.5)
        process = start(pack_until_step, number, folder)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        done = saved_in(folder)
        packed = counted.pack(folder, max_bad=0.5)
        assert packed.rows.tolist() == [i for i in range(100) if i not in BAD]
        assert counted.reads == list(range(done, 100))
        found = contents(folder / "counted")
        assert {name: found[name] for name in expected} == expected
        assert names_in(folder) == ["counted"]
        shutil.rmtree(folder)
        number += 1
    assert number > 20


@forks
@pytest.mark.parametrize("replacing", [False, True], ids=["a new pack", "a pack of changed files"])
def test_a_pack_killed_before_it_has_its_name_is_finished_without_decoding(tmp_path, in_small_steps, monkeypatch, replacing):
    if replacing:
        Counted(70, (5,), "an earlier state").pack(tmp_path, max_bad=0.5)

    def pack_until_named():
        replace = os.replace

        def kill(source, target):
            if source == tmp_path / "counted.part":
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = kill
        Counted(100, BAD).pack(tmp_path, max_bad=0.5)

    process, counted = start(pack_until_named), Counted(100, BAD)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert "counted.part" in names_in(tmp_path) and "counted" not in names_in(tmp_path)
    assert len(counted.pack(tmp_path, max_bad=0.5)) == 95 and counted.reads == []
    assert contents(tmp_path / "counted") == undisturbed(tmp_path)
    assert not leftovers(tmp_path)


def edit_progress(part, **values):
    progress = json.loads((part / "progress.json").read_text())
    (part / "progress.json").write_text(json.dumps(progress | values))


def cut_lines(part, lines):
    listing = (part / "bad.txt").read_bytes().splitlines(keepends=True)
    (part / "bad.txt").write_bytes(b"".join(listing[:lines]))


def flip(path, place):
    """Changes one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "images.npy cut short": lambda part: os.truncate(part / "images.npy", 5000),
    "images.npy with another pixel": lambda part: flip(part / "images.npy", 1000),
    "images.npy noise": lambda part: (part / "images.npy").write_bytes(np.random.default_rng(0).bytes(300_000)),
    "images.npy a pipe": lambda part: ((part / "images.npy").unlink(), os.mkfifo(part / "images.npy")),
    "images.npy gone": lambda part: (part / "images.npy").unlink(),
    "images.npy empty": lambda part: os.truncate(part / "images.npy", 0),
    "progress.json no JSON": lambda part: (part / "progress.json").write_text("{"),
    "progress.json empty": lambda part: (part / "progress.json").write_text(""),
    "progress.json no object": lambda part: (part / "progress.json").write_text("[1]"),
    "progress.json no text": lambda part: (part / "progress.json").write_bytes(b"\xff\xfe\xfd"),
    "progress.json without a number": lambda part: edit_progress(part, done=None),
    "progress.json gone": lambda part: (part / "progress.json").unlink(),
    "bad.txt cut within a line": lambda part: os.truncate(part / "bad.txt", (part / "bad.txt").stat().st_size - 3),
    "bad.txt cut after a line": lambda part: cut_lines(part, 2),
    "bad.txt cut after a line, and images.npy longer": lambda part: (cut_lines(part, 2), os.truncate(part / "images.npy", 400_000)),
    "bad.txt empty": lambda part: os.truncate(part / "bad.txt", 0),
    "bad.txt with another reason": lambda part: flip(part / "bad.txt", (part / "bad.txt").read_bytes().index(b"\t") + 1),
    "bad.txt a pipe": lambda part: ((part / "bad.txt").unlink(), os.mkfifo(part / "bad.txt")),
    "bad.txt gone": lambda part: (part / "bad.txt").unlink(),
    "bad.txt no text": lambda part: (part / "bad.txt").write_bytes(b"\xff" * 500),
    "of other files": lambda part: edit_progress(part, made_from="other files"),
    "of another size": lambda part: edit_progress(part, size=64),
    "a folder where a file is": lambda part: ((part / "images.npy").unlink(), (part / "images.npy").mkdir()),
    "pack.json no JSON": lambda part: (part / "pack.json").write_text("{"),
    "pack.json of other files": lambda part: (part / "pack.json").write_text(json.dumps({"made_from": "other files"})),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_is_not_gone_on_from(tmp_path, in_small_steps, damage):
    assert interrupted_at(70, tmp_path) == 64
    damage(tmp_path / "counted.part")
    Counted(100, BAD).pack(tmp_path, max_bad=0.5)
    assert contents(tmp_path / "counted") == undisturbed(tmp_path)


def test_what_was_begun_of_other_files_is_not_gone_on_from(tmp_path, in_small_steps):
    interrupted_at(70, tmp_path, bad=(1, 2), made_from="an earlier state")
    counted = Counted(100, BAD)
    counted.pack(tmp_path, max_bad=0.5)
    assert len(counted.reads) == 100
    assert contents(tmp_path / "counted") == undisturbed(tmp_path)


@forks
def test_of_two_processes_that_pack_the_same_images_one_decodes_them(tmp_path, in_small_steps):
    counted, log = Counted(60, BAD), tmp_path / "log"

    def pack():
        found = packing.pack(read_slowly(counted, log, 0.005), tmp_path / "counted", "counted", max_bad=0.5)
        assert found.images[:, 0, 0, 0].tolist() == [i for i in range(60) if i not in BAD]

    both = [start(pack) for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert numbers_in(log) == list(range(60))
    assert names_in(tmp_path) == ["counted", "log"]


@forks
@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGSEGV, None], ids=["killed", "crashed", "left"])
def test_a_decoding_process_that_dies_is_one_line_and_can_be_gone_on_from(tmp_path, in_small_steps, monkeypatch, way):
    monkeypatch.setattr(packing, "cores", lambda: 2)
    counted, ours = Counted(100, BAD), os.getpid()
    whole = counted.images

    def read(i):
        if i == 70 and os.getpid() != ours:
            while not (tmp_path / "counted.part" / "progress.json").exists():
                time.sleep(0.002)
            os._exit(1) if way is None else os.kill(os.getpid(), way)
        return counted.read(i)

    dying = packing.Images(100, read, whole.made_from, whole.labels, whole.classes, whole.files)
    try:
        packing.pack(dying, tmp_path / "counted", "counted", max_bad=0.5)
    except UserError as error:
        said = str(error)
    gc.collect()        # ends the other process now, not within a later test
    assert re.fullmatch(r"counted: a process that decodes images died near 00\d\d.png after \d\d of 100, of too little memory or a "
                        "file that breaks the decoder: this command goes on from there", said)
    monkeypatch.setattr(packing, "cores", lambda: 0)
    counted.pack(tmp_path, max_bad=0.5)
    assert counted.reads[0] > 0 and contents(tmp_path / "counted") == undisturbed(tmp_path)


@forks
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_a_pack_does_not_depend_on_how_many_processes_decode(tmp_path, in_small_steps, monkeypatch, workers):
    expected = undisturbed(tmp_path)
    monkeypatch.setattr(packing, "cores", lambda: workers)
    counted = Counted(100, BAD)
    counted.pack(tmp_path, max_bad=0.5)
    assert counted.reads == []      # other processes have read them
    assert contents(tmp_path / "counted") == expected


# --------------------------------------------------------------------------------------------------
# Disks
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_is_one_line_and_goes_on_later(tmp_path, in_small_steps, monkeypatch, number):
    expected, failed = undisturbed(tmp_path), 0
    while True:
        folder, left = tmp_path / f"full{failed}", failed

        def full(file):
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(number, os.strerror(number))

        counted = Counted(100, BAD)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                counted.pack(folder, max_bad=0.5)
                break
            except UserError as error:
                assert str(error) == f"the disk under {folder} is full: make room and run this again, counted is gone on from"
        before = len(counted.reads)
        counted.pack(folder, max_bad=0.5)
        assert before + len(counted.reads) <= 100 + 16      # a block
        assert contents(folder / "counted") == expected
        shutil.rmtree(folder)
        failed += 1
    assert failed > 15


def test_a_disk_that_fills_within_images_npy_is_one_line_and_goes_on_later(tmp_path, in_small_steps, monkeypatch):
    class Full(io.FileIO):
        def write(self, content):
            if self.name.endswith("images.npy") and self.tell() + len(content) > 150_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(content)

    def open_full(path, mode="r", **kwargs):
        return Full(str(path), mode.replace("b", "")) if "a" in mode else open(path, mode, **kwargs)

    counted = Counted(100, BAD)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "open", open_full, raising=False)
        with pytest.raises(UserError, match=f"^the disk under {tmp_path} is full: make room and run this again, counted is gone on from$"):
            counted.pack(tmp_path, max_bad=0.5)
    counted.pack(tmp_path, max_bad=0.5)
    assert counted.reads[0] >= 32
    assert contents(tmp_path / "counted") == undisturbed(tmp_path)


def test_a_disk_that_is_too_small_is_said_before_anything_is_decoded(tmp_path, monkeypatch):
    counted, usage = Counted(100), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=200_000_000))
    with pytest.raises(UserError, match=f"^{tmp_path} has 0.2 GB free, and packing counted needs 0.2 GB: make room, or choose another --data-dir$"):
        counted.pack(tmp_path)
    assert counted.reads == [] and names_in(tmp_path) == []


@forks
def test_a_finished_pack_in_a_folder_that_can_not_be_written_is_opened(tmp_path):
    with shared_folder() as folder:
        save_images(folder / "pictures", ["a.png", "b.png"], RED)
        load_source(f"mine={folder / 'pictures'}", folder / "data")
        for path in (folder / "data").rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        (folder / "data").chmod(0o555)
        before = sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))
        packed = as_nobody(load_source, f"mine={folder / 'pictures'}", folder / "data")
        assert_colour(packed.images, RED)
        assert sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


@forks
def test_a_folder_that_can_not_be_written_is_one_line():
    with shared_folder() as folder:
        save_images(folder / "pictures", ["a.png", "b.png"], RED)
        error = as_nobody(load_source, f"mine={folder / 'pictures'}", folder / "data")
        assert isinstance(error, UserError)
        assert str(error) == f"{folder}/data/packed can't be written (Permission denied): choose another --data-dir"


def test_white_stays_white(tmp_path):
    save_image(tmp_path / "pictures" / "a.png", WHITE, (500, 300))
    assert_colour(pack_odd(tmp_path).images[0], WHITE)
