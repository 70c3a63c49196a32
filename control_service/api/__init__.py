"""The edge towards clients: one servicer for each proto service, over the use cases. Holds no rule and no state."""
