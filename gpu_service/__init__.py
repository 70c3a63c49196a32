"""The GPU service: owns model loading, quantization and training, and streams progress back."""
