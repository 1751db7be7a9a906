#!/usr/bin/env python3
"""Computes the site's bitmaps: assets/icon.png and assets/kiln.png. Needs only Python's own library."""

import math
import pathlib
import struct
import zlib


def png(width, height, pixel):
    """The bytes of a PNG file whose pixels are `pixel(x, y)`, three numbers from 0 to 255."""
    rows = b"".join(
        b"\0" + bytes(part for x in range(width) for part in pixel(x, y)) for y in range(height)
    )

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def heat(value):
    """A colour from black over red and orange to pale yellow, for 0 to 1."""
    value = min(max(value, 0.0), 1.0)
    # Few steps: it looks like clay, and compresses.
    value = round(value * 24) / 24
    return (
        int(255 * min(1.0, value * 1.9)),
        int(255 * min(1.0, max(0.0, value * 1.7 - 0.45))),
        int(255 * max(0.0, value * 2.2 - 1.35) * 0.7),
    )


def embers(x, y):
    """A sum of waves, brighter below."""
    total = 0.0
    for number, (right, down, phase) in enumerate(
        [(0.011, 0.023, 0.3), (0.027, -0.017, 1.9), (-0.041, 0.031, 4.2), (0.067, 0.059, 2.6), (0.013, 0.101, 5.5)]
    ):
        total += math.sin(x * right + y * down + phase + math.sin(y * 0.02 + number)) / (number + 1.5)
    return heat(0.18 + 0.42 * y / 240 + 0.22 * total)


def icon(x, y):
    """A glowing door."""
    across, up = (x - 31.5) / 22, (63 - y) / 50
    inside = abs(across) < 1 and 0 <= up < 0.55 + 0.45 * math.sqrt(max(0.0, 1 - across * across))
    if not inside:
        return (140, 74, 47)
    return heat(1.05 - up * 0.8 - abs(across) * 0.45)


assets = pathlib.Path(__file__).parent / "assets"
(assets / "kiln.png").write_bytes(png(960, 240, embers))
(assets / "icon.png").write_bytes(png(64, 64, icon))
