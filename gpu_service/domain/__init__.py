"""Rules of the GPU service, in standard library only: specs, plans, states. Does no I/O but reading what a plan left."""
