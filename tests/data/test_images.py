"""Images are found and read as LLaVA's trainer finds and reads them; what it would not find is told, what it would
choke on is bounded."""

from __future__ import annotations

import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from tive.data import images
from tive.data.images import MOST_PIXELS, BadImage, find_image, look_for, open_image, resize_padded

BACKGROUND = (122, 116, 104)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "written, name",
    [
        *(("AVIF", "a.avif"), ("AVIF", "avif.jpg"), ("ICO", "a.ico"), ("TGA", "a.tga"), ("PCX", "a.pcx")),
        *(("DDS", "a.dds"), ("SGI", "a.sgi"), ("TIFF", "a.tif"), ("JPEG2000", "a.jp2"), ("DIB", "a.dib")),
        *(("ICNS", "a.icns"), ("MPO", "mpo.jpg"), ("PNG", "png.jpg"), ("WEBP", "webp.png"), ("TGA", "tga.jpg")),
    ],
)
def test_every_format_is_read_as_the_trainers_pillow_reads_it_under_any_name(tmp_path, written, name):
    if written == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    noise(32, 32).save(tmp_path / name, written)
    read = open_image(str(tmp_path / name))
    with Image.open(tmp_path / name) as theirs:
        assert read.tobytes() == theirs.convert("RGB").tobytes() and read.mode == "RGB"


@pytest.mark.parametrize("start", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 7\n", b"\xd7\xcd\xc6\x9a", b"GRIB"])
def test_a_format_whose_reader_would_start_another_program_is_not_read(tmp_path, monkeypatch, start):
    (tmp_path / "a.jpg").write_bytes(start + bytes(200))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(BadImage, match="no image format that is known"):
        open_image(str(tmp_path / "a.jpg"))


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "COCO" / "caf\u00e9").mkdir(parents=True)
    for name in ("Photo.PNG", "other.png", "twice.png", "Twice.png", unicodedata.normalize("NFD", "\u00e9t\u00e9.png")):
        noise(4, 3).save(tmp_path / "COCO" / "caf\u00e9" / name)
    (tmp_path / "COCO" / "folder.png").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "image, found",
    [
        ("COCO/café/other.png", "other.png"),
        ("COCO/café/other.jpg", "other.png"),
        ("COCO/café/Photo.png", "Photo.PNG"),
        ("coco/café/photo.png", "Photo.PNG"),
        ("COCO/café/photo.jpg", "Photo.PNG"),
        ("coco/cafe\u0301/OTHER.JPG", "other.png"),
        ("COCO/café/\u00e9t\u00e9.png", unicodedata.normalize("NFD", "\u00e9t\u00e9.png")),
        ("./COCO//café/other.png", "other.png"),
    ],
)
def test_a_file_whose_name_differs_in_extension_capitals_or_unicode_form_stands_in(folder, image, found):
    expected = str(folder / "COCO" / "caf\u00e9" / found)
    assert find_image(str(folder), image) == expected
    bad, renamed = look_for(str(folder), [image])
    assert bad == {}
    assert renamed == ({} if image.removeprefix("./").replace("//", "/") == f"COCO/café/{found}" else {image: expected})


@pytest.mark.parametrize(
    "image", ["COCO/café/TWICE.png", "COCO/café/photos.png", "COCO/FOLDER.png", "vg/café/other.png"]
)
def test_a_name_that_two_files_or_none_could_stand_for_is_missing(folder, image):
    with pytest.raises(BadImage, match=r"^missing image$"):
        find_image(str(folder), image)
    assert look_for(str(folder), [image, image])[0] == {image: "missing image"}


def test_a_path_with_backslashes_is_told_what_it_is(folder):
    with pytest.raises(BadImage, match="missing image: its path has backslashes, write it with /"):
        find_image(str(folder), r"COCO\nowhere\1.png")


def test_reading_what_is_found_can_be_asked_for(folder):
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    names = ["broken.png", "coco/café/other.png"]
    assert look_for(str(folder), names) == ({}, {"coco/café/other.png": str(folder / "COCO/café/other.png")})
    bad, _ = look_for(str(folder), names, open_image)
    assert list(bad) == ["broken.png"] and bad["broken.png"].startswith("unreadable image: ")


SIDE = int(MOST_PIXELS**0.5)


@pytest.mark.parametrize(
    "size, good", [((1, SIDE), True), ((1, SIDE + 1), False), ((30_000, 6), False), ((9, 7), True)]
)
def test_a_padded_square_is_bounded_by_a_number_and_not_by_the_machine(tmp_path, size, good):
    path = str(tmp_path / "thin.png")
    Image.new("RGB", size).save(path)
    assert open_image(path).size == size  # where nothing is padded, nothing is wrong with it
    if good:
        assert open_image(path, padded=True).size == size
    else:
        with pytest.raises(BadImage, match=f"above {MOST_PIXELS} pixels when it is padded to a square"):
            open_image(path, padded=True)


def test_a_lack_of_memory_is_not_the_images_fault(tmp_path, monkeypatch):
    noise(4, 3).save(tmp_path / "a.png")

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(MemoryError):
        open_image(str(tmp_path / "a.png"))


SIZES = st.tuples(st.integers(1, 700), st.integers(1, 700)) | st.tuples(st.integers(1, 9), st.integers(300, 2500))


@settings(max_examples=40, deadline=None)
@given(size=SIZES, turned=st.booleans(), edge=st.sampled_from([56, 336]), strip=st.sampled_from([1, 10_000, 1 << 22]))
def test_an_image_resized_before_it_is_padded_has_the_pixels_of_llavas_own_computation(size, turned, edge, strip):
    from llava.mm_utils import expand2square

    image = noise(*(size[::-1] if turned else size))
    strip = max(strip, max(size) * max(size) // 50)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_STRIP_PIXELS", strip)
        ours = resize_padded(image, BACKGROUND, edge, Image.Resampling.BICUBIC)
    theirs = expand2square(image, BACKGROUND).resize((edge, edge), Image.Resampling.BICUBIC)
    assert ours.size == theirs.size and ours.tobytes() == theirs.tobytes()


def test_the_largest_square_that_is_allowed_takes_little_memory():
    program = (
        "import sys; import torch; from PIL import Image; from tive.data.images import resize_padded; "
        "from tive.util.device import peak_memory; cpu = torch.device('cpu'); "
        "image = Image.new('RGB', (6, int(sys.argv[1]))); before = peak_memory(cpu); "
        "resize_padded(image, (1, 2, 3), 336, Image.Resampling.BICUBIC); print(peak_memory(cpu) - before)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(SIDE)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150 * 2**20  # the square alone has 683 MiB
