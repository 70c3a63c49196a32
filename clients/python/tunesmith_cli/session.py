"""What every command that talks to a control service has: client and output. Declares --address and --output once."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec

import typer

from tunesmith_cli.output import Format, Output
from tunesmith_client import Client, ClientConfig, RetryPolicy

# Somebody waits in front of a screen: where nothing serves, that is said sooner than a program wants to hear it.
_RETRY = RetryPolicy(max_attempts=4)
DEFAULT_ADDRESS = ClientConfig().address

Parameters = ParamSpec("Parameters")

AddressOption = Annotated[
    str | None,
    typer.Option("--address", envvar="TUNESMITH_ADDRESS", help="host:port of the control service.", show_default=False),
]
OutputOption = Annotated[Format, typer.Option("--output", "-o", help="How results are written.")]


class Session:
    """A client and an output for the length of one command. Nothing is dialed before the first call."""

    def __init__(self, *, client: Client, out: Output) -> None:
        self.client = client
        self.out = out


def command(app: typer.Typer, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function whose first parameter is `session`; --address and --output are added to its own options."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*, address: str | None, output: Format, **arguments: Any) -> None:
            config = ClientConfig(address=address or DEFAULT_ADDRESS, retry=_RETRY)
            with Client(config=config) as client:
                function(Session(client=client, out=Output(output)), **arguments)

        own = list(inspect.signature(function).parameters.values())[1:]
        keyword = inspect.Parameter.KEYWORD_ONLY
        added = [
            inspect.Parameter("address", keyword, default=None, annotation=AddressOption),
            inspect.Parameter("output", keyword, default=Format.TABLE, annotation=OutputOption),
        ]
        parameters = [parameter.replace(kind=keyword) for parameter in own] + added
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        # Typer follows __wrapped__ to the inner signature otherwise.
        del run.__wrapped__
        app.command(name)(run)
        return function

    return register
