"""Writers of row files in every supported format, for tests of the code that reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml


def quoted(value: str) -> str:
    return '"' + value.replace('"', '""') + '"'


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = [
        ",".join(map(quoted, fields)) for fields in ([*rows[0]], *([row[name] for name in rows[0]] for row in rows))
    ]
    path.write_bytes("\n".join(lines).encode())


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)


def write_yaml(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(yaml.safe_dump(rows, allow_unicode=True), encoding="utf-8")


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    ".jsonl": write_jsonl,
    ".csv": write_csv,
    ".parquet": write_parquet,
    ".yaml": write_yaml,
    ".yml": write_yaml,
}


def file_of(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path
