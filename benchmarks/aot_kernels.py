"""What a compiled program says of its kernels: read from the cubins in it, without NVIDIA's tools."""

import struct
from collections.abc import Iterator
from typing import Any

_REGISTERS, _FRAME = 0x2F, 0x11  # attributes of a kernel in a cubin's .nv.info


def kernels(executable: Any) -> dict[str, dict[str, int]]:
    """Registers and bytes of stack a thread, of every kernel in a compiled program: spilled registers lie on the stack."""
    found: dict[str, dict[str, int]] = {}
    for cubin in _cubins(executable.runtime_executable().serialize()):
        found |= _resources(cubin)
    return found


def _cubins(blob: bytes) -> Iterator[bytes]:
    starts = []
    at = blob.find(b"\x7fELF")
    while at >= 0:
        starts.append(at)
        at = blob.find(b"\x7fELF", at + 4)
    for start, stop in zip(starts, [*starts[1:], len(blob)], strict=True):
        yield blob[start:stop]


def _resources(elf: bytes) -> dict[str, dict[str, int]]:
    """Reads a cubin's sections: names of symbols, and the attributes that `.nv.info` holds of them."""
    table, entry, count, names_at = struct.unpack_from("<Q", elf, 0x28)[0], *struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, table + entry * index) for index in range(count)]

    def text(section: tuple[Any, ...], offset: int) -> str:
        start = section[4] + offset
        return elf[start : elf.index(b"\0", start)].decode()

    sections = {text(headers[names_at], header[0]): header for header in headers}
    if ".nv.info" not in sections or ".symtab" not in sections:
        return {}
    symbols = sections[".symtab"]
    strings = headers[symbols[6]]
    info = sections[".nv.info"]
    found: dict[str, dict[str, int]] = {}
    at, stop = info[4], info[4] + info[5]
    while at < stop:
        form, attribute, size = struct.unpack_from("<BBH", elf, at)
        at += 4
        if form == 4 and attribute in (_REGISTERS, _FRAME):
            symbol, value = struct.unpack_from("<II", elf, at)
            name = text(strings, struct.unpack_from("<I", elf, symbols[4] + 24 * symbol)[0])
            found.setdefault(name, {})["registers" if attribute == _REGISTERS else "stack"] = value
        at += size if form == 4 else 0
    return found
