"""Rules of the GPU service, in standard library only: specs, plans, states. Reads nothing but plans."""
