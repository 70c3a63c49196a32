"""The child process that owns devices and one resident base model; the only code that imports torch."""
