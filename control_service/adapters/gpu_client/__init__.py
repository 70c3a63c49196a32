"""The GPU service's gRPC contract as the `NodeClient` port."""
