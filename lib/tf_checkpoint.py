"""TensorFlow checkpoints (PREFIX.index, PREFIX.data-*) read without TensorFlow, as OpenAI published GPT-2.

The index is a LevelDB table (https://github.com/google/leveldb/blob/main/doc/table_format.md) of protocol
buffers: a header, then where in the data files each variable lies.
"""

import struct
from pathlib import Path

import numpy as np

from lib.cli import UserError

MAGIC = 0xDB4775248B80FB57
DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}         # of TensorFlow's DataType


def read_checkpoint(prefix):
    """{variable name: array} of the checkpoint PREFIX, memory-mapped. Raises UserError when it is damaged."""
    index = Path(f"{prefix}.index")
    try:
        entries = dict(table(index.read_bytes()))
        shards = dict(fields(entries.pop(b""))).get(1, 0)
        data = [np.memmap(f"{prefix}.data-{s:05}-of-{shards:05}", mode="c") for s in range(shards)]
        return {name.decode(): array(value, data) for name, value in entries.items()}
    except OSError as error:
        raise UserError(f"cannot read the TensorFlow checkpoint {prefix}: {error}") from None
    except (ValueError, KeyError, IndexError, struct.error) as error:
        raise UserError(f"the TensorFlow checkpoint {prefix} is damaged or cut short ({error}); "
                        "download its .index and .data files again") from None


def table(content):
    """(key, value) pairs of a LevelDB table, uncompressed as TensorFlow writes it."""
    footer = content[-48:]
    if len(footer) < 48 or struct.unpack("<Q", footer[40:])[0] != MAGIC:
        raise ValueError("no TensorFlow index")
    _, at = varint(footer, 0)                        # metaindex: offset and size, of no use here
    _, at = varint(footer, at)
    for _, handle in block(content, footer[at:]):
        yield from block(content, handle)


def block(content, handle):
    """(key, value) pairs of the block at `handle` (offset, size); keys share their start with the last."""
    offset, at = varint(handle, 0)
    size, _ = varint(handle, at)
    end = offset + size
    body, (kind, crc) = content[offset:end], struct.unpack("<BI", content[end : end + 5])
    if kind != 0:
        raise ValueError("compressed index")
    if masked_crc(content[offset : end + 1]) != crc:
        raise ValueError("wrong checksum")
    end = size - 4 * (1 + struct.unpack("<I", body[-4:])[0])         # restart points and their number follow
    at, key = 0, b""
    while at < end:
        shared, at = varint(body, at)
        unshared, at = varint(body, at)
        length, at = varint(body, at)
        key = key[:shared] + body[at : at + unshared]
        at += unshared
        yield key, body[at : at + length]
        at += length


def array(entry, data):
    """The array that a BundleEntryProto describes; zeros are left out of it."""
    values = dict(fields(entry))
    if 7 in values:
        raise ValueError("a variable in slices")
    dims = [dict(fields(dim)).get(1, 0) for number, dim in fields(values.get(2, b"")) if number == 2]
    offset, size = values.get(4, 0), values.get(5, 0)
    raw = data[values.get(3, 0)][offset : offset + size]
    return raw.view(DTYPES[values[1]]).reshape(dims)


def fields(message):
    """(number, value) of each field of a protocol buffer: integers, or bytes."""
    at = 0
    while at < len(message):
        tag, at = varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = varint(message, at)
        else:
            length, at = varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = message[at : at + length], at + length
        yield tag >> 3, value


def varint(buffer, at):
    """An integer in groups of seven bits, lowest first -> (value, where the next thing begins)."""
    value = shift = 0
    while True:
        byte = buffer[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def masked_crc(content):
    """CRC-32C, rotated and shifted as LevelDB stores it."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
