"""Answers of a base or an adapter, token by token, on an engine that no run needs. Trains nothing, keeps no journal."""
