"""`fedpace client`: one device, until it is stopped."""

from __future__ import annotations

import asyncio
import logging
import signal

from fedpace.clients.agent import Agent
from fedpace.clients.connection import DeviceOptions

log = logging.getLogger("fedpace.client")


async def run_device(options: DeviceOptions) -> int:
    """Runs the agent; SIGINT and SIGTERM let it leave gracefully, a second one at once. Returns the exit code."""
    agent = Agent(options)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, agent.stop)
    await agent.run()
    log.info("%s has left", options.name)
    return 0
