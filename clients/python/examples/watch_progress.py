"""Follows a job as it happens, with asyncio; survives restarts of the service. Another program would draw a chart here.

usage: watch_progress.py JOB_ID [ADDRESS]
"""

import asyncio
import sys

from tunesmith.common.v1 import event_pb2
from tunesmith_client import AsyncClient, state_name


async def main(job_id: str, address: str = "127.0.0.1:50051") -> None:
    """Prints every step and every change of state until the job is over."""
    async with AsyncClient(address) as client:
        losses: dict[int, float] = {}
        # Each event once, in order, from the first one on, however often the connection breaks.
        async for event in client.jobs.watch(job_id):
            if event.kind == event_pb2.EVENT_KIND_STEP:
                step = event.payload.step
                losses[step.step] = step.loss
                print(f"{step.step}/{step.total_steps} loss {step.loss:.4f}")
            elif event.kind == event_pb2.EVENT_KIND_RESUMED:
                # What came after the checkpoint is trained again: a chart forgets it.
                losses = {step: loss for step, loss in losses.items() if step <= event.payload.resumed.from_step}
            elif event.kind == event_pb2.EVENT_KIND_JOB_STATE:
                print(f"job {state_name(event.payload.job_state.state)}")
        print(f"{len(losses)} steps")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
