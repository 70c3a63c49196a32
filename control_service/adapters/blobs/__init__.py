"""Bytes on disk: content-addressed blobs, the output tree that people read, and the operator's import root."""
