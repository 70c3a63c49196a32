"""The GPU service: owns models, devices and training. Its server process never imports torch."""
