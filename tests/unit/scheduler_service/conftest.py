"""Fixtures of the scheduler service's tests."""

import uuid

import pytest

from services.ledger import open_ledger
from tests.unit.scheduler_service.driver_rig import Rig


@pytest.fixture
async def rig() -> Rig:
    return await Rig(await open_ledger(f"memory://{uuid.uuid4().hex}")).lead()
