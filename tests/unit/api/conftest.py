"""A migrated database in a directory of its own."""

import pytest

from blockyard_api.store import database


@pytest.fixture
async def store(tmp_path):
    async with database.opened(tmp_path / "blockyard.db") as opened:
        yield opened
