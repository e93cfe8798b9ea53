"""Memory of the cards people have."""

from __future__ import annotations

from estimators.errors import InputError, shown
from estimators.units import size

#: card -> MiB, as its driver reports the total. In-band ECC takes 1/16 of GDDR cards for servers (L4, A10, A40, L40S,
#: T4). Driver versions differ by a few hundred MiB; the CUDA context (about 0.3 GiB) is not taken off.
GPUS = {
    "t4": 15360,
    "l4": 23034,
    "l40": 46068,
    "l40s": 46068,
    "a10": 23028,
    "a10g": 23028,
    "a30": 24576,
    "a40": 46068,
    "p100": 16384,
    "v100-16gb": 16384,
    "v100-32gb": 32768,
    "a100-40gb": 40960,
    "a100-80gb": 81920,
    "h100": 81559,
    "h100-80gb": 81559,
    "h100-nvl": 95830,
    "h200": 143771,
    "gh200-96gb": 97871,
    "b200": 183359,
    "gb200": 189471,
    "gtx-1080-ti": 11264,
    "rtx-2080-ti": 11264,
    "rtx-3060": 12288,
    "rtx-3080": 10240,
    "rtx-3090": 24576,
    "rtx-4060-ti-16gb": 16380,
    "rtx-4070": 12282,
    "rtx-4080": 16376,
    "rtx-4090": 24564,
    "rtx-5080": 16303,
    "rtx-5090": 32607,
    "rtx-a4000": 16376,
    "rtx-a5000": 24564,
    "rtx-a6000": 49140,
    "rtx-6000-ada": 49140,
    "rtx-pro-6000": 97887,
    "mi210": 65536,
    "mi250x-gcd": 65536,
    "mi300x": 196608,
    "mi325x": 262144,
}


#: generation -> beginnings of the names of its cards, without signs between.
_GENERATIONS = {
    "pascal": ("p100", "gtx10"),
    "volta": ("v100",),
    "turing": ("t4", "rtx20"),
    "ampere-server": ("a100", "a30"),
    "ampere": ("a10", "a40", "rtx30", "rtxa"),
    "ada": ("l4", "rtx40", "rtx6000ada"),
    "hopper": ("h100", "h200", "gh200"),
    "blackwell": ("b200", "gb200", "rtx50", "rtxpro"),
    "cdna2": ("mi2",),
    "cdna3": ("mi3",),
}


def generation(card: str) -> str:
    """Of a card by its name; empty where that is not known, or is a size.

    >>> generation("Tesla T4"), generation("NVIDIA GeForce RTX 3090"), generation("a100-40gb"), generation("24GiB")
    ('turing', 'ampere', 'ampere-server', '')
    """
    name = _plain(card)
    for vendor in ("nvidia", "tesla", "geforce", "amd", "instinct"):
        name = name.removeprefix(vendor)
    found = (kind for kind, starts in _GENERATIONS.items() if any(name.startswith(one) for one in starts))
    return next(found, "")


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def plain_name(card: str) -> str:
    """A card's name as it is compared with others.

    >>> plain_name("NVIDIA GeForce RTX 2080 Ti")
    'rtx2080ti'
    """
    return _plain(card).removeprefix("nvidia").removeprefix("geforce").removeprefix("tesla")


def capacity(gpu: str) -> int:
    """Bytes of a card's memory.

    Args:
        gpu: The card's name (``"RTX 3090"``) or a size (``"24GiB"``).

    Returns:
        Bytes, from 1 MiB to 1024 TiB.

    Raises:
        InputError: for an unknown card, with the nearest names.

    >>> capacity("24GiB") == capacity("RTX 3090") == 24 * 2**30
    True
    """
    if not isinstance(gpu, str):
        raise InputError(f"gpu={shown(gpu)} is not allowed; it is a size such as '24GiB' or the name of a card")
    nbytes = size(gpu)
    if nbytes is None:
        names = {_plain(name): mib for name, mib in GPUS.items()}
        mib = names.get(_plain(gpu).removeprefix("nvidia").removeprefix("geforce"))
        if mib is None:
            raise InputError(_unknown(gpu))
        nbytes = mib * 2**20
    if not 2**20 <= nbytes <= 2**50:
        raise InputError(f"gpu={shown(gpu)} is not allowed; the memory of a card is from 1 MiB to 1024 TiB")
    return nbytes


def _unknown(gpu: str) -> str:
    text = gpu.strip()
    several = [name for name in GPUS if _plain(gpu) and _plain(name).startswith(plain_name(gpu))]
    if len(several) > 1:
        return f"gpu={shown(gpu)} is one of {', '.join(several)}; say which"
    if _plain(gpu).startswith(("apple", "m1", "m2", "m3", "m4", "m5")):
        return (
            f"gpu={shown(gpu)}: Apple's GPUs share the machine's memory, of which macOS lets them have about three "
            "quarters; give that as a size (96GB of 128), and take the figures, which are CUDA's, as a guide"
        )
    if text.upper().rstrip("GM").replace(".", "", 1).isdigit():
        number = text.upper().rstrip("GM")
        cards = [name for name in GPUS if number in name]
        or_card = f", or {' or '.join(cards)} for the card" if cards and len(number) > 2 else ""
        return f"gpu={shown(gpu)} has no unit; write {number}GiB (2^30 bytes) or {number}GB (10^9 bytes){or_card}"
    from difflib import get_close_matches

    near = get_close_matches(text.lower(), GPUS, n=3)
    guess = f"; nearest names: {', '.join(near)}" if near else f"; cards: {', '.join(GPUS)}"
    return f"gpu={shown(gpu)} is not a size such as 24GiB and no card of that name is known{guess}"
