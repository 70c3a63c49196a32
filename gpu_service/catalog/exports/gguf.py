"""The catalog's `gguf`: known, asked for, and not offered, because nobody who keeps up with the format releases a
converter that can be installed.

llama.cpp's own converter is a script of its source tree. The package `gguf` reads and writes the format and converts no
model. What PyPI has under a converter's name are copies by others, of which one installs files over those of `gguf`.
"""

from gpu_service.catalog.exports.entry import ExportEntry

ENTRY = ExportEntry(
    id="gguf",
    description="llama.cpp's file format",
    not_offered="llama.cpp releases its converter only as a script of its source tree, not as a package that can be "
    "installed; export `merged` and run llama.cpp's convert_hf_to_gguf.py on it",
)
