"""What a finished run leaves: adapter or model, and a report."""

from gpu_service.engine.artifacts.writer import ArtifactRequest, write_all

__all__ = ["ArtifactRequest", "write_all"]
