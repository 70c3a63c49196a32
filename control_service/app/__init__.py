"""Use cases over ports. Knows neither the wire nor a store."""
