"""The blocking client. Owns one channel; knows no request."""

from typing import Self

import grpc

from tunesmith_client._caller import Caller
from tunesmith_client._config import ClientConfig, address_from_environment
from tunesmith_client._nouns import Datasets, Models, Nodes, Projects
from tunesmith_client._nouns_inference import Inference
from tunesmith_client._nouns_training import Artifacts, Jobs


class Client:
    """A control service, by noun. Safe to use from several threads; not across a fork.

    `Client("host:port")`, or `Client(config=ClientConfig(...))`; with neither, `TUNESMITH_ADDRESS` or 127.0.0.1:50051.
    Nothing is dialed before the first call.
    """

    def __init__(self, address: str | None = None, *, config: ClientConfig | None = None) -> None:
        if address is not None and config is not None:
            raise ValueError("give an address or a config, not both: the config has the address")
        self.config = config or ClientConfig(address=address or address_from_environment())
        self._channel = grpc.insecure_channel(self.config.address, options=self.config.channel_options())
        caller = self._caller = Caller(self.config)
        self.projects = Projects(self._channel, caller)
        self.datasets = Datasets(self._channel, caller)
        self.models = Models(self._channel, caller)
        self.jobs = Jobs(self._channel, caller)
        self.artifacts = Artifacts(self._channel, caller)
        self.nodes = Nodes(self._channel, caller)
        self.inference = Inference(self._channel, caller)

    def close(self) -> None:
        """Closes the channel; open watches end, and so do calls of other threads."""
        self._caller.close()
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
