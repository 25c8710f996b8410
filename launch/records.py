"""Files of records, one JSON object a line, each with its attempt's number: metrics.jsonl and system/*.jsonl.

They are only appended to. A last line without its end is being written, or was when its writer was killed.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 1 << 16


def drop_torn_line(path: Path) -> None:
    """Cut off a last line that a killed process left without its end."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        size = file.seek(0, 2)
        whole = _last_newline(file, size) + 1
        if whole < size:
            file.truncate(whole)


def last_record(path: Path) -> dict[str, Any] | None:
    """The last whole record of a file, read from its end; None if there is none."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        end = _last_newline(file, file.seek(0, 2))
        if end < 0:
            return None
        start = _last_newline(file, end) + 1
        file.seek(start)
        record: dict[str, Any] = json.loads(file.read(end - start))
    return record


def _last_newline(file: Any, end: int) -> int:
    """Position of the last newline in front of `end`; -1 if there is none."""
    while end > 0:
        start = max(end - _BLOCK, 0)
        file.seek(start)
        found: int = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found
        end = start
    return -1


def whole_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, in order."""
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def batches(path: Path, offset: int, points: int) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """The whole records behind `offset` (bytes) in groups, each with the offset behind it.

    A group is either one record without metrics, or records of one attempt with at most `points` values (more only if
    a single record has more).
    """
    group: list[dict[str, Any]] = []
    size, end = 0, offset
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                break
            record = json.loads(line)
            values = len(record.get("metrics", ()))
            fits = "metrics" in record and size + values <= points
            if group and not (fits and record["attempt"] == group[0]["attempt"]):
                yield group, end
                group, size = [], 0
            end += len(line)
            if "metrics" in record:
                group.append(record)
                size += values
            else:
                yield [record], end
    if group:
        yield group, end
