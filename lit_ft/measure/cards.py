"""GPUs that are sold for training, and their memory, speed and bandwidth.

The memory is the total that torch reports, for example in its out-of-memory errors. The driver and
error correction keep a part of what the card is sold with. The total differs by up to 0.2 GiB
between drivers, and the smaller value is listed. The speed and the bandwidth are those of the
makers' data sheets.

Lightning's table of peaks (`get_available_flops`) is not used here: it needs the device itself,
lacks half of these cards, and gives the rate without tensor cores for GeForce cards.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from lit_ft.terminal.console import printable

_GIB = 1 << 30
_LARGEST_GIB = 1024  # of a size with a unit: no card comes near it
_LARGEST_BARE_GIB = 300  # without a unit, a larger number is a mistyped name: 409 for 4090


@dataclass(frozen=True)
class Card:
    """A GPU, or a size of memory.

    Attributes:
        name: The name under which the card is sold, without the maker's; None for a size.
        memory_bytes: The memory that torch reports as the total.
        flops: The peak rate of dense matrix products in FLOP/s, of 16-bit numbers that are added up
            in float32. The numbers are bfloat16, or float16 if the card has no bfloat16. None for
            a size.
        bandwidth: The bandwidth of the memory in bytes per second; None for a size.
        has_bfloat16: Whether the card computes in bfloat16. A size is taken to.
    """

    name: str | None
    memory_bytes: int
    flops: float | None = None
    bandwidth: float | None = None
    has_bfloat16: bool = True


def _card(name: str, gib: float, tflops: float, gb_per_s: float, *, bfloat16: bool = True) -> Card:
    return Card(name, int(gib * _GIB), tflops * 1e12, gb_per_s * 1e9, bfloat16)


# Name, GiB, TFLOP/s and GB/s. If a card is sold as a module (SXM) and as a PCIe board and has one
# row, they are the module's.
CARDS = (
    _card("RTX 2060", 5.6, 25.8, 336, bfloat16=False),
    _card("RTX 2080 Ti", 10.5, 53.8, 616, bfloat16=False),
    _card("RTX 3060", 11.6, 25.6, 360),
    _card("RTX 3080", 9.7, 59.5, 760),
    _card("RTX 3090", 23.5, 71, 936),
    _card("RTX 4060 Ti 16GB", 15.5, 44.1, 288),
    _card("RTX 4070", 11.5, 58.3, 504),
    _card("RTX 4080", 15.5, 97.5, 717),
    _card("RTX 4090", 23.5, 165.2, 1008),
    _card("RTX 5070 Ti", 15.4, 87.9, 896),
    _card("RTX 5080", 15.4, 112.6, 960),
    _card("RTX 5090", 31.3, 209.5, 1792),
    _card("RTX A4000", 15.6, 76.7, 448),
    _card("RTX A5000", 23.5, 111.1, 768),
    _card("RTX A6000", 47.4, 154.8, 768),
    _card("RTX 6000 Ada", 47.4, 364.2, 960),
    _card("RTX PRO 6000 Blackwell", 94.9, 503.8, 1792),
    _card("T4", 14.5, 65, 320, bfloat16=False),
    _card("V100 16GB", 15.7, 125, 900, bfloat16=False),
    _card("V100 32GB", 31.7, 125, 900, bfloat16=False),
    _card("L4", 22.0, 121, 300),
    _card("L40S", 44.3, 362, 864),
    _card("A10", 22.0, 125, 600),
    _card("A10G", 22.0, 70, 600),
    _card("A30", 23.5, 165, 933),
    _card("A100 40GB", 39.3, 312, 1555),
    _card("A100 80GB", 79.1, 312, 2039),
    _card("H100", 79.1, 989.4, 3350),
    _card("H100 PCIe", 79.1, 756, 2000),
    _card("H200", 139.7, 989.4, 4800),
    _card("B200", 178.3, 2250, 8000),
    _card("GH200", 94.5, 989.4, 4000),
)

# What `torch.cuda.get_device_name` says, and people type, where it is not a name from above.
_ALSO = {
    "RTX 4060 Ti": "RTX 4060 Ti 16GB",
    "RTX 6000 Ada Generation": "RTX 6000 Ada",
    "RTX PRO 6000": "RTX PRO 6000 Blackwell",
    "RTX PRO 6000 Blackwell Workstation Edition": "RTX PRO 6000 Blackwell",
    "RTX PRO 6000 Blackwell Server Edition": "RTX PRO 6000 Blackwell",
    "V100-SXM2-16GB": "V100 16GB",
    "V100-PCIE-16GB": "V100 16GB",
    "V100-SXM2-32GB": "V100 32GB",
    "V100-PCIE-32GB": "V100 32GB",
    "A100-SXM4-40GB": "A100 40GB",
    "A100-PCIE-40GB": "A100 40GB",
    "A100-SXM4-80GB": "A100 80GB",
    "A100 80GB PCIe": "A100 80GB",
    "H100 SXM": "H100",
    "H100 80GB HBM3": "H100",
    "GH200 480GB": "GH200",  # the size of the processor's memory
}


def card(text: str) -> Card:
    """Return the card that a name or a size of memory means.

    >>> card("rtx4090") is card("NVIDIA GeForce RTX 4090") is card("4090 24GB")
    True
    >>> card("24GB").memory_bytes == 24 << 30
    True

    Args:
        text: The name that people type or that `torch.cuda.get_device_name` reports, in any case
            and with or without spaces and the maker's name. A size counts as GiB, because cards
            are sold so: "24", "24GB" and "24 GiB" are the same.

    Raises:
        ValueError: If there is no such card and it is no size that a card can have. The message
            starts with the text, and gives the nearest names.
    """
    found = _named(_key(text)) or _sized(text)
    if found is None:
        names = _near(_key(text))
        hint = f"Did you mean {' or '.join(names)}?" if names else f"Known are {_all_names()}."
        given = printable(" ".join(text.split()))[:40]
        raise ValueError(f"{given}: no such card. {hint} A size works too, such as 24GB.")
    return found


def _key(text: str) -> str:
    """Return a name without what people leave out: spaces, capitals and the maker's words."""
    joined = re.sub(r"[\s_-]+", "", text.lower())
    return re.sub(r"^(nvidia|geforce|tesla|rtx)+", "", joined)


_BY_KEY = {_key(one.name): one for one in CARDS if one.name}
_BY_KEY |= {_key(name): _BY_KEY[_key(meant)] for name, meant in _ALSO.items()}


def _named(key: str) -> Card | None:
    """Return the card of a name, which its size may follow: "409024gb" is the RTX 4090."""
    if key in _BY_KEY:
        return _BY_KEY[key]
    for length in (1, 2, 3):
        if followed := re.fullmatch(rf"(.+?)([0-9]{{{length}}})gi?b", key):
            found, size = _BY_KEY.get(followed[1]), int(followed[2]) * _GIB
            if found is not None and 0.9 * size <= found.memory_bytes <= size:
                return found
    return None


def _sized(text: str) -> Card | None:
    size = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(g|gb|gib)?", text.strip().lower())
    if size is None:
        return None
    gib = float(size[1])
    in_range = 1 <= gib <= (_LARGEST_GIB if size[2] else _LARGEST_BARE_GIB)
    return Card(None, int(gib * _GIB)) if in_range else None


def _near(key: str) -> list[str]:
    """Return up to three names of cards: those that start with the text, or those most like it."""
    starting = [known for known in _BY_KEY if key and known.startswith(key)]
    close = starting or get_close_matches(key[:40], _BY_KEY, n=3)
    names = (_BY_KEY[known].name for known in close)
    return list(dict.fromkeys(name for name in names if name))[:3]


def _all_names() -> str:
    return ", ".join(one.name for one in CARDS if one.name)
