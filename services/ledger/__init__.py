"""The durable ledger of accepted work, files and jobs, in memory or in Redis."""

from services.ledger.open import open_ledger
from services.ledger.types import Delivery, Ledger, LedgerUnavailable, StaleToken, TaskRecord, TaskState

__all__ = ["Delivery", "Ledger", "LedgerUnavailable", "StaleToken", "TaskRecord", "TaskState", "open_ledger"]
