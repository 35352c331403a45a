"""What a data file is instead of a JSON list or JSON Lines, and the command that turns it into records."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
import shlex
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import BinaryIO

from tive.data.conversations import KEYS_OF_TURNS
from tive.data.images import EXTENSIONS
from tive.util.errors import UserError
from tive.util.text import listed, shown_value

_HEAD_BYTES = 1 << 20
_DATA_ENDINGS = (".json", ".jsonl", ".parquet", ".arrow")
_PYTHON = shlex.quote(sys.executable or "python")
_UTF = "is {encoding} text: make it UTF-8 with `iconv -f {encoding} -t UTF-8 {source} > {target}`"
# First bytes -> what the file is, and what to do: {source} is the file, {target} the records, {folder} a new folder.
_KINDS = {
    b"\x1f\x8b": "is gzip: unpack it with `gunzip -c {source} > {target}`",
    b"BZh": "is bzip2: unpack it with `bunzip2 -c {source} > {target}`",
    b"\xfd7zXZ\0": "is xz: unpack it with `unxz -c {source} > {target}`",
    b"\x28\xb5\x2f\xfd": "is zstd: unpack it with `zstd -dc {source} > {target}`",
    codecs.BOM_UTF32_LE: _UTF.replace("{encoding}", "UTF-32"),
    codecs.BOM_UTF32_BE: _UTF.replace("{encoding}", "UTF-32"),
    codecs.BOM_UTF16_LE: _UTF.replace("{encoding}", "UTF-16"),
    codecs.BOM_UTF16_BE: _UTF.replace("{encoding}", "UTF-16"),
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself: run `git lfs pull` in its folder",
    b"<": "is a web page or XML: a download may have failed; download the data file itself",
}
_FIRST_ITEM = re.compile(r"\[[ \t\r\n]*")
_BETWEEN = re.compile(r"[ \t\r\n,:]*")
# A list of data files has these in its entries: InternVL's, LLaMA-Factory's; LLaVA-NeXT's is a list.
_FILE_KEYS = {"annotation", "json_path", "file_name", "cloud_file_name", "load_from", "hf_hub_url", "ms_hub_url"}
_FILE_KEYS |= {"script_url"}
_LIST_OF_SOURCES = re.compile(rb'\[\s*\{[^{}\[\]]*"json_path"')
_FILES = "is a list of data files, not of records: give the scripts the files that it names"
_RECORDS_OF_SAMPLES = (
    "import json, pathlib, sys; folder, ends = pathlib.Path(sys.argv[1]), sys.argv[3:]; "
    'images = {file.with_suffix(""): str(file.relative_to(folder)) for file in folder.rglob("*") '
    "if file.suffix.lower() in ends}; "
    'samples = [(json.loads(file.read_text()), images.get(file.with_suffix(""))) '
    'for file in sorted(folder.rglob("*.json"))]; '
    'records = [sample | {"image": image} if image else sample for sample, image in samples]; '
    'json.dump(records, open(sys.argv[2], "w"))'
)
_ROWS_OF_COLUMNS = (
    "[dict(zip(data, row)) for row in zip(*(x.values() if isinstance(x, dict) else x for x in data.values()))]"
)


def open_data_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a data file at its start; a `UserError` where it is not there, is a pipe, or is in another container by its
    first bytes, with the command that turns it into records."""
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(
            f"{path} is a pipe or a device, and records are read more than once; write them to a file first, as in "
            "`zcat data.json.gz > data.json`, and name that"
        )
    try:
        file = open(path, "rb")  # noqa: SIM115 - the caller closes it
        head = file.read(_HEAD_BYTES)
        file.seek(0)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', error)}; check the path") from error
    if problem := container_of(head, path):
        file.close()
        raise UserError(f"{path} {problem}")
    return file


def container_of(head: bytes, path: Path) -> str | None:
    """What a file that begins with `head` is, with the remedy, going on from its name; None for a JSON list, for JSON
    Lines, and for what is not known."""
    stem = Path(os.path.abspath(path)).with_name(path.name.split(".")[0] or "data")
    names = {"source": os.path.abspath(path), "target": f"{stem}_records.json", "folder": f"{stem}_unpacked"}
    quoted = {name: shlex.quote(value) for name, value in names.items()}
    is_tar = head[257:262] == b"ustar"
    if is_tar or head.startswith(b"PK\x03\x04"):
        return _archive(path, "tar" if is_tar else "zip", quoted)
    text = head.removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n")
    for first, what in _KINDS.items():
        if head.startswith(first) or (first == b"<" and text.startswith(first)):
            return what.format(**quoted)
    zeros = head[:4].count(0)
    if zeros in (2, 3):
        encoding = f"UTF-{16 if zeros == 2 else 32}" + ("LE" if head[0] else "BE")
        return _UTF.format(encoding=encoding, **quoted)
    if _LIST_OF_SOURCES.match(text):
        return _FILES
    return _object(codecs.utf_8_decode(text, "ignore")[0], quoted) if text.startswith(b"{") else None


def _archive(path: Path, kind: str, quoted: dict[str, str]) -> str:
    """What is in a zip or tar, and the command that unpacks it."""
    try:
        if kind == "zip":
            members = [name for name in zipfile.ZipFile(path).namelist() if not name.endswith("/")]
        else:
            with tarfile.open(path) as archive:
                members = [member.name for _, member in zip(range(1000), archive, strict=False) if member.isfile()]
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError):
        return f"is a {kind} archive that is damaged: download it again"
    # A Mac adds files of its own.
    files = [PurePath(name) for name in members if "__MACOSX" not in name]
    images = {file.with_suffix("") for file in files if file.suffix.lower() in EXTENSIONS}
    texts = {file.with_suffix("") for file in files if file.suffix == ".json"}
    unpack = f"{_PYTHON} -m {kind}file -e {quoted['source']} {quoted['folder']}"
    if images & texts:
        make = f"{_PYTHON} -c {shlex.quote(_RECORDS_OF_SAMPLES)} {quoted['folder']} {quoted['target']} "
        make += " ".join(EXTENSIONS)
        return (
            f"is a WebDataset (an image and a .json a sample): unpack it and make records of it with `{unpack} && "
            f"{make}`; the image folder is {quoted['folder']}"
        )
    if len(members) == 1 and not images:
        to_text = "unzip -p {source} > {target}" if kind == "zip" else "tar -xOf {source} > {target}"
        return f"is a {kind} archive: unpack it with `{to_text.format(**quoted)}`"
    what = f"{kind} of images" if images else f"{kind} archive of several files"
    names = [f"{quoted['folder']} as the image folder"] if images else []
    data = listed([str(file) for file in files if file.suffix in _DATA_ENDINGS], 5)
    names += [f"the data file below {quoted['folder']} ({data})"] if data or not images else []
    return f"is a {what}: unpack it with `{unpack}`, and name {' and '.join(names)}"


def _object(text: str, quoted: dict[str, str]) -> str | None:
    """What an object is that holds records, or names files; None for a record."""
    what, records = "", ""
    entries = []
    with contextlib.suppress(ValueError, RecursionError):  # its end may lie behind the head
        if text[json.JSONDecoder().raw_decode(text)[1] :].strip():
            return None  # JSON Lines
    # Where the text breaks off, or is no JSON, its reader says so better.
    with contextlib.suppress(ValueError, IndexError, RecursionError):
        for key, start in entries_of(text):
            is_list = text[start] == "["
            inner = _FIRST_ITEM.match(text, start).end() if is_list else start  # type: ignore[union-attr]
            if text[inner] != "]":
                entries.append((key, json.JSONDecoder().raw_decode(text, inner)[0], is_list))
    for key, value, is_list in entries:
        if key in KEYS_OF_TURNS:
            # A column is a list of texts or of lists of turns, or, as pandas writes it, an object by row number.
            is_texts = isinstance(value, str) and key not in ("conversations", "messages", "texts")
            if not (is_texts or isinstance(value, list) if is_list else isinstance(value, dict) and "0" in value):
                return None
            what, records = "is a table by columns", _ROWS_OF_COLUMNS
        elif not what and isinstance(value, dict) and not value.keys().isdisjoint(KEYS_OF_TURNS):
            what, records = "is an object whose values are records", "list(data.values())"
            if is_list:
                what = f"is an object with a list of records under {shown_value(key)}"
                records = f"data[{json.dumps(key)}]"
    if entries and all(isinstance(value, dict) and value.keys() & _FILE_KEYS for _, value, _ in entries):
        return _FILES
    if not what:
        return None
    code = f'import json, sys; data = json.load(open(sys.argv[1])); json.dump({records}, open(sys.argv[2], "w"))'
    return f"{what}: make it a list with `{_PYTHON} -c {shlex.quote(code)} {quoted['source']} {quoted['target']}`"


def entries_of(text: str) -> Iterator[tuple[str, int]]:
    """The keys of the JSON object that a text begins with, and where the value of each starts; a `ValueError`,
    `IndexError` or `RecursionError` where the text breaks off or is no JSON."""
    parse, position = json.JSONDecoder().raw_decode, 1

    def after(position: int) -> int:
        return _BETWEEN.match(text, position).end()  # type: ignore[union-attr]  # it matches nothing too

    while text[position := after(position)] == '"':
        key, position = parse(text, position)
        start = after(position)
        yield key, start
        position = parse(text, start)[1]
