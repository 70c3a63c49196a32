"""One module an optimizer: `build(parameters, settings)` with the resolved `Optimizer` message."""
