"""A program in a process of its own, which does not outlive the block that it was started for."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any


@asynccontextmanager
async def running(*argv: str, **options: Any) -> AsyncIterator[asyncio.subprocess.Process]:  # noqa: ANN401 - subprocess's
    """Start a program, with what `asyncio.create_subprocess_exec` takes; it is killed if it runs at the block's end."""
    process = await asyncio.create_subprocess_exec(*argv, **options)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
