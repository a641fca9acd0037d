"""Personal data masked: e-mail addresses, telephone numbers, public IP addresses, numbers of payment cards.

What only looks like them stays: versions (1.2.3.4 behind `version`, `v` or a name), addresses of repositories
(git@host:owner/name), pictures (icon@2x.png), dates, times, prices, ISBNs, private and documentation addresses, long
numbers whose check digit is wrong, numbers that are counted up (01 02 03 04 05) or round (300-400-5000). Telephone
numbers are those that are written as such: + and a country code; North America's (212) 555-0123 and 212-555-0123; a
leading 0 and groups, as in much of Europe and Asia; Chinese mobile numbers.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

_LETTER = "A-Za-z\\u00c0-\\u024f\\u0370-\\u03ff\\u0400-\\u04ff"  # Chinese stands next to addresses without a space
_NAME = f"[{_LETTER}0-9_+%-]+"
_EMAIL = re.compile(
    rf"(?<![{_LETTER}0-9_.+%-])(?<!//){_NAME}(?:\.{_NAME}){{0,8}}@(?:[{_LETTER}0-9][{_LETTER}0-9-]{{0,62}}\.){{1,8}}"
    rf"(?!(?:png|jpe?g|gif|webp|svg|avif)\b)[{_LETTER}]{{2,24}}(?![{_LETTER}0-9-]|[._][{_LETTER}0-9_]|:[\w.~-]*/)"
)  # icon@2x.png is a picture
_NUMBERED = re.compile(
    r"(?:\bv|\bver(?:sion)?s?|\brelease|\bbuild|\brevision|\brev|\bfirmware|版本号?|§|第|\bsection|\bchapter|\bfigure|\btable)"
    r"[\s.:：#=\"']*$",
    re.I,
)
_NAMED = re.compile(r"(\b[A-Z][a-z]\w*)( |/)$")  # software; what is called so can be an address all the same:
_ADDRESSED = {"Address", "Addresses", "At", "By", "Client", "Dns", "For", "From", "Gateway", "Host", "In", "Is", "On"}
_ADDRESSED |= {"Origin", "Peer", "Ping", "Server", "Source", "The", "To", "User", "Via", "Visitor", "With"}
MOST_OF_A_VERSION = 31
_IPV4 = re.compile(r"(?<![\w.-])\d{1,3}(?:\.\d{1,3}){3}(?![\w-]|\.\d)", re.ASCII)
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9a-fA-F]{3}:[0-9a-fA-F:]{3,36}(?![\w:])", re.ASCII)
_CARD = re.compile(r"(?<![\w.,+/-])(?<!\d[ -])[2-6]\d{3}(?:[ -]?\d){9,15}(?![\w/-]|[.,]\d)", re.ASCII)
_PHONE = re.compile(
    r"(?<![\w.,+#$€£¥/=-])(?<!\d[ .-])(?:"
    r"\+(?:[17]|[2-9]\d{1,2})(?:[ .-]?\(\d{1,4}\))?"
    r"[ .-]?\d{1,5}(?:[ .-]?\d{2,5}){1,5}"  # +44 161 496 0000, +1 (212) 555-0123
    r"|\([2-9]\d{2}\) ?[2-9]\d{2}[-. ]\d{4}"  # (212) 555-0123
    r"|(?:1[-. ])?[2-9]\d{2}([-. ])[2-9]\d{2}\1\d{4}"  # 212-555-0123
    r"|[(（]0\d{1,4}[)）] ?\d{3,4}[ -]?\d{3,5}"  # (0161) 496 0000
    r"|0\d{1,4}([ /-])\d{3,4}(?:[ -]?\d{3,4})?"  # 0161 496 0000, 030/123456
    r"|0\d(?:([ .])\d{2})(?:\3\d{2}){3}"  # 01 23 45 67 89
    r"|1[3-9]\d([ -]?)\d{4}\4\d{4}"  # 138 0013 8000
    r")(?![\w/-]|[., ]\d)",
    re.ASCII,
)
PHONE_DIGITS = range(9, 16)
NORTH_AMERICAN_DIGITS = 11  # of those behind +1, this one among them


def _is_public_ip(found: str, before: str) -> bool:
    try:
        address = ipaddress.ip_address(found)
    except ValueError:  # a part above 255, or with a zero in front
        return False
    named = _NAMED.search(before)
    small = "." in found and all(int(part) <= MOST_OF_A_VERSION for part in found.split("."))
    # with a slash, as Chrome/120.0.0.0, it is a product in a browser's name for itself
    version = named is not None and named[1] not in _ADDRESSED and (small or named[2] == "/")
    return address.is_global and not address.is_multicast and not version and not _NUMBERED.search(before)


def _is_card(found: str, _: str) -> bool:
    """Luhn's check digit, and a length that a network with these first digits gives out."""
    digits = [int(sign) for sign in found if sign.isdecimal()]
    number = "".join(map(str, digits))
    doubled = sum(sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    if (doubled + sum(digits[-1::-2])) % 10:
        return False
    return any(number.startswith(first) and len(number) in lengths for first, lengths in _NETWORKS)


_NETWORKS: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...] = (
    (("4",), (13, 16, 19)),  # Visa
    (("51", "52", "53", "54", "55"), (16,)),  # Mastercard
    (tuple(map(str, range(222, 272))), (16,)),
    (("34", "37"), (15,)),  # American Express
    (("6011", "644", "645", "646", "647", "648", "649", "65"), (16, 19)),  # Discover
    (("300", "301", "302", "303", "304", "305", "36", "38", "39"), (14, 16)),  # Diners Club
    (tuple(map(str, range(3528, 3590))), (16,)),  # JCB
    (("62",), (16, 17, 18, 19)),  # UnionPay
)


def _is_phone(found: str, _: str) -> bool:
    groups = re.findall(r"\d+", found)
    counted = len(groups) > 3 and all(int(b) == int(a) + 1 for a, b in pairwise(groups))
    is_round = len(groups) > 1 and all(group.endswith("00") for group in groups)
    digits = "".join(groups)
    other = found.startswith("+1") and len(digits) != NORTH_AMERICAN_DIGITS  # +1.234567 is a number with its sign
    return len(digits) in PHONE_DIGITS and not counted and not is_round and not other


def _always(_found: str, _before: str) -> bool:
    return True


class Kind(NamedTuple):
    """One kind of personal data."""

    patterns: tuple[re.Pattern[str], ...]
    holds: Callable[[str, str], bool]  # whether what a pattern has found, behind this text, is one
    placeholder: str


KINDS: Mapping[str, Kind] = {  # in this order: what is masked by one is not seen by the next
    "email": Kind((_EMAIL,), _always, "[EMAIL]"),
    "card": Kind((_CARD,), _is_card, "[CARD]"),
    "ip": Kind((_IPV4, _IPV6), _is_public_ip, "[IP]"),
    "phone": Kind((_PHONE,), _is_phone, "[PHONE]"),
}


def mask(text: str, kinds: tuple[str, ...]) -> tuple[str, Counter[str]]:
    """The text with placeholders for what is of these kinds, and how many of each there were."""
    counts: Counter[str] = Counter()
    for name in kinds:
        kind = KINDS[name]

        def masked(found: re.Match[str], name: str = name, kind: Kind = kind) -> str:
            if not kind.holds(found[0], found.string[max(0, found.start() - 20) : found.start()]):
                return found[0]
            counts[name] += 1
            return kind.placeholder

        if name != "email" or "@" in text:
            for pattern in kind.patterns:
                text = pattern.sub(masked, text)
    return text, counts
