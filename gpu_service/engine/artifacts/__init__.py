"""What a finished run leaves: adapter or model, exports of it, and a report."""

from gpu_service.engine.artifacts.writer import ArtifactRequest, WrittenArtifacts, write_all

__all__ = ["ArtifactRequest", "WrittenArtifacts", "write_all"]
