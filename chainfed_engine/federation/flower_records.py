"""A message of codec.py as Flower records, and back. Light: a site starts a process with it for every message.

The payload is one array of bytes: Flower stores arrays by content, so parameters that several sites lack are kept once,
and cuts them into chunks, so there is no limit of a message but ours.
"""

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from chainfed_engine.errors import CorruptFile

_STYPE = "chainfed.bytes"


def to_records(header: bytes, payload: bytes) -> RecordDict:
    array = Array(dtype="uint8", shape=(len(payload),), stype=_STYPE, data=payload)
    return RecordDict({"header": ConfigRecord({"header": header}), "payload": ArrayRecord({"payload": array})})


def from_records(content: RecordDict) -> tuple[bytes, bytes]:
    """Header and payload, unread. Raises CorruptFile for records of another app."""
    try:
        header, array = content["header"]["header"], content["payload"]["payload"]
        payload = array.data
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(f"message: expected the records header and payload, got others ({error!r:.60})") from None
    if not isinstance(header, bytes) or not isinstance(payload, bytes) or array.stype != _STYPE:
        raise CorruptFile("message: expected bytes in header and payload")
    return header, payload
