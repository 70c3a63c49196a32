"""The gRPC edge of the GPU service: servicers, wire, errors, interceptors. The only room that knows gRPC."""
