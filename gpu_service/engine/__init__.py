"""The engine: the one process that owns a device, loads a base model and trains runs on it.

The only room that imports torch. It writes every event of a run to the run's journal, keeps its base resident between
runs, and speaks to its shim over one pipe. It knows neither the server nor gRPC.
"""
