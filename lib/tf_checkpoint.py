"""TensorFlow checkpoints (PREFIX.index, PREFIX.data-*) read without TensorFlow, as OpenAI published GPT-2.

The index is a LevelDB table (https://github.com/google/leveldb/blob/main/doc/table_format.md) of protocol
buffers: a header, then where in the data files each variable lies.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lib import records
from lib.cli import UserError

MAGIC = 0xDB4775248B80FB57
DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}         # of TensorFlow's DataType
LARGEST = 2**20                                                      # bytes of an index; GPT-2's has 5,215


def read_tf_checkpoint(prefix: str) -> dict[str, np.ndarray]:
    """The variables of the checkpoint PREFIX by name, memory-mapped. Raises UserError if it is damaged."""
    try:
        entries = dict(read_table(records.read_bytes(f"{prefix}.index", LARGEST)))
        shards = dict(read_message(entries.pop(b""))).get(1, 0)
        files = [Path(f"{prefix}.data-{s:05}-of-{shards:05}") for s in range(min(shards, 1000))]
        if missing := [str(file) for file in files if not file.is_file()]:
            raise UserError(f"the TensorFlow checkpoint {prefix} is not complete: {missing[0]} is missing")
        data = [np.memmap(file, mode="c") for file in files]
        variables = {name.decode(): read_variable(entry, data) for name, entry in entries.items()}
        if sum(array.nbytes for array in variables.values()) > sum(map(len, data)):
            raise ValueError("variables overlap")
        return variables
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read the TensorFlow checkpoint {prefix}: {error}") from None
    except (ValueError, LookupError, TypeError, OverflowError, struct.error) as error:
        raise UserError(f"the TensorFlow checkpoint {prefix} is damaged or cut short ({error}); "
                        "download its .index and .data files again") from None


def read_table(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The (key, value) pairs of a LevelDB table, uncompressed as TensorFlow writes it."""
    footer = content[-48:]
    if len(footer) < 48 or struct.unpack("<Q", footer[40:])[0] != MAGIC:
        raise ValueError("not a TensorFlow index")
    _, at = read_varint(footer, 0)                   # offset and size of the metaindex, of no use here
    _, at = read_varint(footer, at)
    end = 0
    for _, handle in read_block(content, footer[at:]):
        offset, at = read_varint(handle, 0)
        if offset < end:
            raise ValueError("blocks overlap")
        end = offset + read_varint(handle, at)[0]
        yield from read_block(content, handle)


def read_block(content, handle):
    """The (key, value) pairs of a block at `handle` (offset, size); keys share their start with the last."""
    offset, at = read_varint(handle, 0)
    size, _ = read_varint(handle, at)
    end = offset + size
    body, (compression, crc) = content[offset:end], struct.unpack("<BI", content[end : end + 5])
    if compression != 0:
        raise ValueError("compressed index")
    if masked_crc32c(content[offset : end + 1]) != crc:
        raise ValueError("wrong checksum")
    end = size - 4 * (1 + struct.unpack("<I", body[-4:])[0])         # restart points and their number follow
    at, key = 0, b""
    while at < end:
        shared, at = read_varint(body, at)
        unshared, at = read_varint(body, at)
        length, at = read_varint(body, at)
        key = key[:shared] + body[at : at + unshared]
        if len(key) > 1000:
            raise ValueError("a name of over 1,000 bytes")
        at += unshared
        yield key, body[at : at + length]
        at += length


def read_variable(entry, data):
    """The array that a BundleEntryProto describes; fields that are zero are left out of it."""
    values = dict(read_message(entry))
    if 7 in values:
        raise ValueError("a variable in slices")
    shape = read_message(values.get(2, b""))
    dims = [dict(read_message(dim)).get(1, 0) for number, dim in shape if number == 2]
    offset, size = values.get(4, 0), values.get(5, 0)
    raw = data[values.get(3, 0)][offset : offset + size]
    return raw.view(DTYPES[values[1]]).reshape(dims)


def read_message(message):
    """The (number, value) of each field of a protocol buffer; values are integers or bytes."""
    at = 0
    while at < len(message):
        tag, at = read_varint(message, at)
        wire_type = tag & 7
        if wire_type == 0:
            value, at = read_varint(message, at)
        else:
            length, at = read_varint(message, at) if wire_type == 2 else ({1: 8, 5: 4}[wire_type], at)
            value, at = message[at : at + length], at + length
        yield tag >> 3, value


def read_varint(buffer, at):
    """An integer in groups of seven bits, lowest first -> (value, where the next thing begins)."""
    value = shift = 0
    while True:
        byte = buffer[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number of over 64 bits")


def masked_crc32c(content):
    """CRC-32C, rotated and shifted as LevelDB stores it."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
