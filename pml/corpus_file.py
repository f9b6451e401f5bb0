"""The corpus of a run as a Parquet file in its folder, so that recall can be tested again without the source."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pml.corpus import Corpus, Example
from pml.errors import InputError
from pml.parquet import write_table

__all__ = ["CORPUS_NAME", "HELD_OUT_NAME", "corpus_hash", "read_corpus", "read_targets", "write_corpus"]

CORPUS_NAME = "corpus.parquet"
HELD_OUT_NAME = "held_out.parquet"

SCHEMA = pa.schema(
    [
        ("example_id", pa.int32()),
        ("query", pa.string()),
        ("target", pa.string()),  # null if only the ids define it
        ("source", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("target_ids", pa.list_(pa.int32())),
        ("replaced", pa.list_(pa.int32())),
        ("fact_id", pa.int32()),  # null if each example asks for its own fact
    ]
)
HEADER = b"pml"
"""Key in the file's metadata for the properties of the whole corpus, as JSON."""


def write_corpus(path: Path, corpus: Corpus) -> None:
    """Write queries and targets as the user wrote them, with their token ids, atomically.

    Args:
        path: File to write.
        corpus: The corpus.
    """
    rows: dict[str, list[Any]] = {name: [getattr(e, name) for e in corpus.examples] for name in SCHEMA.names[:-1]}
    rows["fact_id"] = list(corpus.fact_ids) if corpus.fact_ids is not None else [None] * len(corpus)
    header = {
        "name": corpus.name,
        "entropy_bits": corpus.entropy_bits,
        "settings": corpus.settings,
        "encoding": corpus.encoding,
        "content_hash": corpus.content_hash,
    }
    table = pa.table(rows, schema=SCHEMA).replace_schema_metadata({HEADER: json.dumps(header).encode()})
    write_table(path, table)


def read_corpus(path: Path) -> Corpus:
    """Read a corpus back.

    Raises:
        InputError: If the file is missing or damaged, or its ids do not match its content hash.
    """
    try:
        table = pq.read_table(path, schema=SCHEMA)
        header = json.loads((pq.read_schema(path).metadata or {})[HEADER])
        examples = list(_examples(table))
        fact_ids = table["fact_id"].to_pylist()
        corpus = Corpus(
            name=header["name"],
            examples=examples,
            entropy_bits=header["entropy_bits"],
            settings=header["settings"],
            fact_ids=None if None in fact_ids else fact_ids,
            encoding=header["encoding"],
        )
    except OSError as error:
        raise InputError(f"{path}: cannot be read; expected the corpus that a run leaves in its folder") from error
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: not the corpus of a run ({reason}); run it again, or restore the file") from error
    if corpus.content_hash != header["content_hash"]:
        raise InputError(f"{path}: its token ids do not match the content hash stored with them; restore the file")
    return corpus


def corpus_hash(path: Path) -> str:
    """Content hash stored in a corpus file; only the file's metadata is read.

    Raises:
        InputError: If the file is missing or is not a corpus.
    """
    try:
        return str(json.loads((pq.read_schema(path).metadata or {})[HEADER])["content_hash"])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the corpus of a run; run it again, or restore the file") from error


def read_targets(path: Path, example_ids: Sequence[int]) -> dict[int, str]:
    """Texts of the targets with these example ids, by id; targets that have no text are left out.

    Raises:
        InputError: If the file is missing or is not a corpus.
    """
    try:
        columns, chosen = ["example_id", "target"], [("example_id", "in", list(example_ids))]
        rows = pq.read_table(path, columns=columns, filters=chosen).to_pylist()
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the corpus of a run; run it again, or restore the file") from error
    return {row["example_id"]: row["target"] for row in rows if row["target"] is not None}


def _examples(table: pa.Table) -> Iterator[Example]:
    for row in table.to_pylist():
        ids = {name: tuple(row[name]) for name in ("prompt_ids", "target_ids", "replaced")}
        yield Example(row["example_id"], **ids, query=row["query"], target=row["target"], source=row["source"])
