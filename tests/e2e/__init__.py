"""The whole pair as processes, driven as its users drive it."""
