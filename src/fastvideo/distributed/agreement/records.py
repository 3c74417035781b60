"""What a rank says about one call, and how several ranks' words differ: pure functions over text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

__all__ = ["Fields", "decode", "describe_difference", "encode"]

Fields = tuple[tuple[str, str], ...]
"""Names and values of a call, both as text, in the order in which the message shows them."""

OPTIONAL = ("layer", "calls_back")
"""Names that are compared only where every rank gives them, as compiled code doesn't: the layer's, and how many calls ago the
call was made whose backward pass this is."""

_NUM_NAMED = 4
"""How many ranks that deviate a message names; of 1,024 one wants to read the first few."""


def encode(number: int, fields: Fields) -> str:
    """Return the record of call `number` as the store keeps it.

    Example:
        >>> decode(encode(3, (("dtype", "bfloat16"),)))
        (3, (('dtype', 'bfloat16'),))
    """
    return f"{number} {json.dumps(fields)}"


def decode(record: bytes | str) -> tuple[int, Fields]:
    """Return what `encode` was given."""
    text = record.decode() if isinstance(record, bytes) else record
    number, _, fields = text.partition(" ")
    return int(number), tuple((name, value) for name, value in json.loads(fields))


def describe_difference(number: int, calls: Mapping[int, Fields]) -> str | None:
    """Say which ranks deviate and in what, or return `None` where all ask for the same.

    What most ranks ask for is taken as meant; of equal halves, that of the lowest rank. What is `OPTIONAL` isn't compared
    where a rank lacks it.

    Args:
        number: The call.
        calls: Fields by global rank, at least one.

    Example:
        >>> print(describe_difference(7, {0: (("query", "(1, 8, 4, 16)"),), 1: (("query", "(1, 9, 4, 16)"),)}))
        ranks disagree on call 7 of their shared attention: rank 1 has query=(1, 9, 4, 16) where rank 0 has query=(1, 8, 4, 16)
    """
    lacking = {name for name in OPTIONAL for fields in calls.values() if not dict(fields).get(name)}
    compared = {rank: _comparable(number, fields, lacking) for rank, fields in sorted(calls.items())}
    counts = Counter(compared.values())
    if len(counts) == 1:
        return None
    meant = max(counts, key=lambda fields: counts[fields])  # the first of equals is that of the lowest rank
    witness = next(rank for rank, fields in compared.items() if fields == meant)
    others = [rank for rank, fields in compared.items() if fields != meant]
    parts = [f"rank {rank} has {_differing(compared[rank], meant)}" for rank in others[:_NUM_NAMED]]
    whole = set().union(*(_names(meant, compared[rank]) for rank in others[:_NUM_NAMED]))
    shown = ", ".join(f"{name}={value}" for name, value in meant if name in whole) or "nothing of it"
    more = f", and {len(others) - _NUM_NAMED} more ranks deviate" if len(others) > _NUM_NAMED else ""
    where = dict(calls[witness]).get("layer") if "layer" not in whole else None
    at = f" (layer {where})" if where else ""
    return (
        f"ranks disagree on call {number} of their shared attention{at}: {'; '.join(parts)} "
        f"where rank {witness} has {shown}{more}"
    )


def _comparable(number: int, fields: Fields, lacking: set[str]) -> Fields:
    """Return the fields without those that a rank lacks, and with the call's number in place of its distance."""
    return tuple(
        ("of_call", str(number - int(value))) if name == "calls_back" else (name, value)
        for name, value in fields
        if name not in lacking
    )


def _names(meant: Fields, own: Fields) -> set[str]:
    return {name for name, _ in set(meant) ^ set(own)}


def _differing(own: Fields, meant: Fields) -> str:
    names = _names(meant, own)
    return ", ".join(f"{name}={value}" for name, value in own if name in names) or "nothing of it"
