"""What a data file is instead of a JSON list or JSON Lines, and the command that turns it into records."""

from __future__ import annotations

import codecs
import json
import os
import re
import shlex
import stat
from pathlib import Path
from typing import Any, BinaryIO

from tive.util.errors import UserError
from tive.util.text import shown_value

_HEAD_BYTES = 1 << 20
# A record has one of these keys; an object that has none may hold records.
_TURNS = ("conversations", "messages")

# First bytes -> what the file is, and how it becomes records; {source} and {target} are the files.
_UNPACK = {
    b"\x1f\x8b": ("gzip", "gunzip -c {source} > {target}"),
    b"BZh": ("bzip2", "bunzip2 -c {source} > {target}"),
    b"\xfd7zXZ\0": ("xz", "unxz -c {source} > {target}"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc {source} > {target}"),
    b"PK\x03\x04": ("a zip archive", "unzip -p {source} > {target}"),
}
_TABLES = {
    b"PAR1": ("Parquet", "read_parquet"),
    b"ARROW1": ("Arrow", "read_feather"),
}
_TEXTS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_BINARIES = {
    b"SQLite format 3\0": "an SQLite database",
    b"\x89HDF\r\n\x1a\n": "HDF5",
    b"\x93NUMPY": "a NumPy array",
    **{b"\x80" + bytes([protocol]): "a Python pickle" for protocol in range(2, 6)},
}
# The first line of a table holds its columns' names; a list, an object or a text of JSON starts otherwise.
_COLUMNS = re.compile(rb"[A-Za-z_\"][^\n{}\[\]]*[,\t][^\n{}\[\]]*(?:\n|$)")
_LFS = b"version https://git-lfs.github.com/spec/"
_YAML = re.compile(rb"(?:%YAML|---\s|(?:#[^\n]*\n|\s)*(?:- |[A-Za-z_][\w.-]*:(?:\s|$)))")


def open_data_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a data file at its start.

    Raises:
        UserError: it is not there, is no file (a pipe, say), or its first bytes tell that it is neither a JSON list of
            records nor JSON Lines; the command that turns it into records is named.
    """
    path = Path(path)
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise UserError(
                f"{path} is a pipe or a device, and records are read more than once; write them to a file first, "
                "as in `zcat data.json.gz > data.json`, and name that"
            )
        file = open(path, "rb")  # noqa: SIM115 - the caller closes it
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', error)}; check the path") from error
    try:
        problem = container_of(file.read(_HEAD_BYTES), path)
        file.seek(0)
    except OSError as error:
        file.close()
        raise UserError(f"cannot read {path}: {error.strerror}; check the disk") from error
    if problem:
        file.close()
        raise UserError(f"{path} {problem}")
    return file


def container_of(head: bytes, path: Path) -> str | None:
    """What a file that begins with `head` is, with the remedy, going on from its name; None for a JSON list, for JSON
    Lines, and for what is not known."""
    source = shlex.quote(str(path))
    target = shlex.quote(str(path.with_name(path.name.split(".")[0] + "_records.json")))
    for magic, (kind, command) in _UNPACK.items():
        if head.startswith(magic):
            return f"is {kind}: unpack it with `{command.format(source=source, target=target)}`"
    for magic, (kind, reader) in _TABLES.items():
        if head.startswith(magic):
            code = "import pandas, sys; pandas.{}(sys.argv[1]).to_json(sys.argv[2], orient='records', lines=True)"
            command = f'python -c "{code.format(reader)}" {source} {target}l'
            return f"is {kind}: export it as JSON Lines with `{command}` (needs pandas and pyarrow)"
    for magic, kind in _BINARIES.items():
        if head.startswith(magic):
            return f"is {kind}: write its records as JSON Lines, one object on each line"
    if head[257:262] == b"ustar":
        return f"is a tar archive: unpack it with `tar -xOf {source} > {target}`"
    for mark, encoding in _TEXTS.items():
        if head.startswith(mark):
            return _encoded(encoding, source, target)
    if head[:4].count(0) == 3:
        return _encoded("UTF-32BE" if head[:1] == b"\0" else "UTF-32LE", source, target)
    if head[:4].count(0) == 2:
        return _encoded("UTF-16BE" if head[:1] == b"\0" else "UTF-16LE", source, target)
    if head.startswith(_LFS):
        return "is a pointer of Git LFS, not the file itself: run `git lfs pull` in its folder, or download the file"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n")
    if text.startswith(b"<"):
        return "is a web page or XML: a download may have failed; download the data file itself"
    if _YAML.match(text):
        return (
            "looks like YAML, a list of data files perhaps: give the scripts the JSON files that it names, each by "
            "itself or joined into one list"
        )
    if _COLUMNS.match(text):
        return "looks like a table (CSV): write each of its rows as a JSON object with `conversations`"
    return _wrapper(text, source, target) if text.startswith(b"{") else None


def _encoded(encoding: str, source: str, target: str) -> str:
    return f"is {encoding} text: make it UTF-8 with `iconv -f {encoding} -t UTF-8 {source} > {target}`"


def _wrapper(head: bytes, source: str, target: str) -> str | None:
    """What an object is whose values are records, or that has a list of records under a key; None for a record."""
    found = _first_holder(codecs.utf_8_decode(head, "ignore")[0])
    if found is None:
        return None
    key, is_list = found
    if is_list:
        what, take = f"is an object with a list of records under {shown_value(key)}", f"[{key!r}]"
    else:
        what, take = "is an object whose values are records", ".values()"
    code = f"import json, sys; json.dump(list(json.load(open(sys.argv[1])){take}), open(sys.argv[2], 'w'))"
    quoted = shlex.quote(code) if re.search(r'["$`\\!]', code) else f'"{code}"'
    return f"{what}: make it a list with `python -c {quoted} {source} {target}`"


def _first_holder(text: str) -> tuple[str, bool] | None:
    """The first key of the object that `text` begins with whose value is a record or a list of records, and whether it
    is a list; None where there is none before the text breaks off, or the object is a record itself."""
    parse = json.JSONDecoder().raw_decode
    found = None
    position = 1
    try:
        while text[position := _skip(text, position, ", \t\r\n")] == '"':
            key, position = parse(text, position)
            position = _skip(text, position, ": \t\r\n")
            if key in _TURNS:
                return None
            is_list = text[position] == "["
            inner = _skip(text, position + 1, " \t\r\n") if is_list else position
            if found is None and text[inner] == "{" and _is_record(parse(text, inner)[0]):
                found = key, is_list
            _, position = parse(text, position)
    except (ValueError, IndexError, RecursionError):
        pass  # the text breaks off, or is no JSON, which its reader says better
    return found


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and any(key in value for key in _TURNS)


def _skip(text: str, position: int, characters: str) -> int:
    while text[position] in characters:
        position += 1
    return position
