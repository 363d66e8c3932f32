"""Damage to files, as disks, copies and kills do it."""

from __future__ import annotations

from pathlib import Path
from random import Random


def flip(path: Path, seed: int = 0) -> None:
    """Flip a bit in the middle half of a file, where the weights are."""
    content = bytearray(path.read_bytes())
    place = Random(seed).randrange(len(content) * 2, len(content) * 6)
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def damaged_once(content: bytes, random: Random, *, cut: bool) -> bytes:
    """Return the content of a file after one kind of damage: cut short, or with one bit flipped."""
    if cut:
        return content[: random.randrange(len(content))]
    place = random.randrange(len(content) * 8)
    flipped = content[place // 8] ^ 1 << place % 8
    return content[: place // 8] + bytes([flipped]) + content[place // 8 + 1 :]


def damaged(content: bytes, random: Random) -> bytes:
    """Return the content of a file with one to three kinds of damage, at random places."""
    for _ in range(random.randint(1, 3)):
        content = random.choice(_DAMAGE)(bytearray(content), random)
    return content


def _flipped(content: bytearray, random: Random) -> bytes:
    for _ in range(random.choice([1, 1, 2, 16])):
        if content:
            content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    return bytes(content)


def _truncated(content: bytearray, random: Random) -> bytes:
    return bytes(content[: random.randrange(len(content) + 1)])


def _zeroed(content: bytearray, random: Random) -> bytes:
    start, length = _block(content, random)
    content[start : start + length] = bytes(min(length, len(content) - start))
    return bytes(content)


def _left_out(content: bytearray, random: Random) -> bytes:
    start, length = _block(content, random)
    del content[start : start + length]
    return bytes(content)


def _repeated(content: bytearray, random: Random) -> bytes:
    start, length = _block(content, random)
    content[start:start] = content[start : start + length]
    return bytes(content)


def _block(content: bytearray, random: Random) -> tuple[int, int]:
    return random.randrange(len(content) + 1), random.choice([1, 7, 64, 512, 4096])


_DAMAGE = (_flipped, _flipped, _truncated, _zeroed, _left_out, _repeated)
