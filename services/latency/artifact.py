"""The content hash of a profile artifact, over its JSON document: whoever reads one can tell whether it was changed."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

HASH_FIELD = "content_hash"
#: Fields that say which artifact this is, not what was measured.
_IDENTITY = frozenset((HASH_FIELD, "profile_id", "version"))


def document_hash(document: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, of the document without its identity. Key order and spacing do not matter, nor whether
    a whole number is written with a fraction."""
    content = {key: _canonical(value) for key, value in document.items() if key not in _IDENTITY}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value
