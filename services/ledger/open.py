"""Opens the ledger that a URL names."""

from urllib.parse import urlsplit

from services.ledger.memory import MemoryLedger, shared_store
from services.ledger.redis import RedisLedger
from services.ledger.types import Ledger, LedgerUnavailable


async def open_ledger(
    url: str,
    *,
    operation_timeout_s: float = 5.0,
    result_ttl_s: float = 3600.0,
    retention_s: float = 30 * 86400.0,
) -> Ledger:
    """Connect to "redis://host:port/db" or share the process's "memory://name".

    operation_timeout_s: bound of every operation. result_ttl_s: how long outcomes are kept. retention_s: how long files
    and ended jobs are kept. Raises LedgerUnavailable, naming the URL without credentials, when the store does not
    answer within the operation timeout; ValueError for another kind of URL.
    """
    scheme = urlsplit(url).scheme
    if scheme == "memory":
        return MemoryLedger(shared_store(url), result_ttl_s=result_ttl_s, retention_s=retention_s)
    if scheme not in ("redis", "rediss"):
        raise ValueError(f"a ledger URL starts with redis://, rediss:// or memory://, not {scheme!r}")
    ledger = RedisLedger(
        url, operation_timeout_s=operation_timeout_s, result_ttl_s=result_ttl_s, retention_s=retention_s
    )
    try:
        await ledger.ping()
    except LedgerUnavailable:
        await ledger.close()
        raise
    return ledger
