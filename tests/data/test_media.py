"""Whatever key and form a record names its media in, they are read, or refused with the key and the remedy."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tive.data.media import (
    IMAGE_KEYS,
    OTHER_IMAGE_KEYS,
    OTHER_MEDIA_KEYS,
    images_in,
    plain_path,
)


class Media(NamedTuple):
    images: tuple[str, ...]
    problem: str | None = None


def media_of(record) -> Media:
    try:
        return Media(images_in(record))
    except ValueError as error:
        return Media((), str(error))


EMPTY = (None, "", [], {}, False, [None], [""], [None, ""])


@pytest.mark.parametrize("key", IMAGE_KEYS)
@pytest.mark.parametrize("value, paths", [("a.png", ("a.png",)), (["a.png"], ("a.png",)), (["a", "b"], ("a", "b"))])
def test_a_path_and_a_list_of_paths_are_read_under_either_key(key, value, paths):
    assert media_of({"conversations": [], key: value}) == Media(paths)


@pytest.mark.parametrize("key", [*IMAGE_KEYS, *OTHER_IMAGE_KEYS, *OTHER_MEDIA_KEYS])
@pytest.mark.parametrize("value", EMPTY, ids=repr)
def test_a_null_or_empty_value_is_no_medium(key, value):
    assert media_of({key: value}) == Media(())
    if key != "image":
        assert media_of({"image": "a.png", key: value}) == Media(("a.png",))


@pytest.mark.parametrize("key", [*OTHER_IMAGE_KEYS, *OTHER_MEDIA_KEYS])
@pytest.mark.parametrize("value", ["a.mp4", ["a.mp4", "b.mp4"], {"path": "a"}, 3, True], ids=repr)
def test_media_under_another_key_are_a_problem_that_names_it(key, value):
    media = media_of({key: value})
    assert media.images == () and f"`{key}`" in media.problem


@pytest.mark.parametrize("key", OTHER_MEDIA_KEYS)
def test_a_video_or_a_sound_beside_an_image_is_a_problem(key):
    assert f"`{key}`" in media_of({"image": "a.png", key: "a.mp4"}).problem


@pytest.mark.parametrize("key", OTHER_IMAGE_KEYS)
def test_where_an_image_came_from_is_no_second_image(key):
    assert media_of({"image": "a.png", key: "https://example.org/a.png"}) == Media(("a.png",))


@pytest.mark.parametrize("key", IMAGE_KEYS)
@pytest.mark.parametrize(
    "value, told",
    [
        ({"bytes": "AAAA", "path": "a.png"}, "is an object"),
        ([{"bytes": "AAAA"}], "is an object"),
        ("data:image/png;base64,AAAA", "holds the image itself"),
        ("A" * 5000, "holds the image itself"),
        ("https://example.org/a.png", "is an address"),
        ("s3://bucket/a.png", "is an address"),
        ("file:///data/a.png", "path below the image folder"),
        (3, "neither a path"),
        (0, "neither a path"),
        (True, "neither a path"),
        ([["a.png"]], "neither a path"),
        (["a.png", None], "neither a path"),
        (["a.png", ""], "neither a path"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_path_is_a_problem_that_says_what_it_is(key, value, told):
    problem = media_of({key: value}).problem
    assert f"`{key}`" in problem and told in problem


@pytest.mark.parametrize("key", ["Image", "IMAGES", "Video", "Audio", "Photo"])
def test_capitals_make_no_key_invisible(key):
    assert f"`{key}`" in media_of({key: "a"}).problem


@pytest.mark.parametrize("key", ["file_name", "image_1", "visual", "x" * 3000, "\x1b[2J"])
@pytest.mark.parametrize("value", ["a.png", "b/c.JPG", ["a.mp4", 3], "https://example.org/a.webp"], ids=repr)
def test_a_media_file_under_a_key_that_nobody_knows_is_not_taken_for_text(key, value):
    problem = media_of({"id": "a.png", key: value}).problem
    assert "names a media file under `" in problem and problem.isprintable() and len(problem) < 160
    assert media_of({"image": "a.png", key: value}) == Media(("a.png",))


@pytest.mark.parametrize(
    "value", ["see a.png", "png", ".", [], ["text", "a.png"], {"a": "a.png"}, 3, None, [[]]], ids=repr
)
def test_what_names_no_media_file_stays_text(value):
    assert media_of({"id": "a.png", "note": value}) == Media(())


def test_the_two_keys_may_name_the_same_images_and_no_others():
    assert media_of({"image": "a.png", "images": ["a.png"]}) == Media(("a.png",))
    assert "`image` and `images`" in media_of({"image": "a.png", "images": ["b.png"]}).problem


@pytest.mark.parametrize("image", ["coco/1.jpg", "./coco/1.jpg", "coco//1.jpg", "./coco/./1.jpg"])
def test_a_path_is_the_same_however_it_is_spelled(image):
    assert plain_path(image) == "coco/1.jpg"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*IMAGE_KEYS, *OTHER_IMAGE_KEYS, *OTHER_MEDIA_KEYS, "id", "dataset"]), VALUES))
def test_any_record_has_paths_or_a_problem_in_one_short_line_or_nothing_that_could_be_media(record):
    media = media_of(record)
    assert all(isinstance(image, str) and image for image in media.images)
    if media.problem:
        assert media.images == () and "\n" not in media.problem and len(media.problem) < 160
    elif not media.images:
        others = (value for key, value in record.items() if key not in ("id", "dataset"))
        assert all(not value or not any(value if isinstance(value, list) else [value]) for value in others)


def test_an_image_that_is_an_object_is_read_by_its_path():
    assert media_of({"image": {"path": "a.jpg", "width": 3}}).images == ("a.jpg",)
    assert media_of({"images": [{"path": "a.jpg", "bytes": None}]}).images == ("a.jpg",)
    assert media_of({"image": {"path": "a.jpg", "bytes": "AA"}}).problem
    assert media_of({"image": {"width": 3}}).problem
