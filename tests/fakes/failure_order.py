"""How a test tells `host_engine` to fail; apart from it, so that telling it needs no training library."""

from __future__ import annotations

# In a run's directory; its text is one of `host_engine`'s failures.
ORDER_FILE = "fail"
