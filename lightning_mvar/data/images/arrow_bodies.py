"""Reads the claimed sizes of the compressed buffers in an Arrow file before anything is decompressed.

Each compressed buffer begins with its decompressed length in 8 bytes, or -1 if it is stored uncompressed. Its position
is in the metadata of its message, a flatbuffers table whose fields are numbered as in Arrow's `Message.fbs`.
"""

from __future__ import annotations

from typing import Any

HEADER = 2  # of Message
DATA = 1  # of DictionaryBatch
BUFFERS, COMPRESSION = 2, 3  # of RecordBatch
BUFFER_BYTES = 16  # offset and length


def decompressed_bytes(source: Any) -> int:
    """Returns the total size in bytes that the compressed buffers of a stream claim; 0 if none are compressed.

    Args:
        source: pyarrow's file, at the beginning of the stream.

    Raises:
        OSError, ValueError: if the stream is damaged.
    """
    from pyarrow.ipc import MessageReader  # type: ignore[import-untyped]

    return sum(claimed_bytes(message) for message in MessageReader.open_stream(source))


def claimed_bytes(message: Any) -> int:
    if message.type not in ("record batch", "dictionary"):
        return 0
    data, body = memoryview(message.metadata), memoryview(message.body)
    batch = follow(data, field_of(data, follow(data, 0), HEADER))
    if message.type == "dictionary":
        batch = follow(data, field_of(data, batch, DATA))
    buffers = field_of(data, batch, BUFFERS)
    if not buffers or not field_of(data, batch, COMPRESSION):
        return 0
    begin = follow(data, buffers)
    count, total = integer(data, begin, 4), 0
    for position in range(begin + 4, begin + 4 + count * BUFFER_BYTES, BUFFER_BYTES):
        offset, length = integer(data, position, 8), integer(data, position + 8, 8)
        if length:
            total += max(0, integer(body, offset, 8))
    return total


def field_of(data: memoryview, table: int, number: int) -> int:
    """Returns the position of a field of a table; 0 if the table lacks it."""
    fields = table - integer(data, table, 4)
    entry = 4 + 2 * number
    offset = integer(data, fields + entry, 2) if entry < integer(data, fields, 2) else 0
    return table + offset if offset else 0


def follow(data: memoryview, position: int) -> int:
    return position + integer(data, position, 4)


def integer(data: memoryview, position: int, size: int) -> int:
    if not 0 <= position <= len(data) - size:
        raise ValueError("its metadata points outside the file")
    return int.from_bytes(data[position : position + size], "little", signed=True)
