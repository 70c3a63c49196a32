"""The asyncio client. Owns one channel of one event loop; knows no request."""

from typing import Self

import grpc

from tunesmith_client._caller_aio import AsyncCaller
from tunesmith_client._config import ClientConfig, address_from_environment
from tunesmith_client._nouns_aio import AsyncDatasets, AsyncModels, AsyncNodes, AsyncProjects
from tunesmith_client._nouns_inference_aio import AsyncInference
from tunesmith_client._nouns_training_aio import AsyncArtifacts, AsyncJobs


class AsyncClient:
    """A control service, by noun, for one event loop. Make it inside the running loop.

    `AsyncClient("host:port")`, or `AsyncClient(config=ClientConfig(...))`; with neither, `TUNESMITH_ADDRESS` or
    127.0.0.1:50051. Nothing is dialed before the first call.
    """

    def __init__(self, address: str | None = None, *, config: ClientConfig | None = None) -> None:
        if address is not None and config is not None:
            raise ValueError("give an address or a config, not both: the config has the address")
        self.config = config or ClientConfig(address=address or address_from_environment())
        self._channel = grpc.aio.insecure_channel(self.config.address, options=self.config.channel_options())
        caller = self._caller = AsyncCaller(self.config)
        self.projects = AsyncProjects(self._channel, caller)
        self.datasets = AsyncDatasets(self._channel, caller)
        self.models = AsyncModels(self._channel, caller)
        self.jobs = AsyncJobs(self._channel, caller)
        self.artifacts = AsyncArtifacts(self._channel, caller)
        self.nodes = AsyncNodes(self._channel, caller)
        self.inference = AsyncInference(self._channel, caller)

    async def close(self) -> None:
        """Closes the channel; open watches end."""
        self._caller.is_closed = True
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
