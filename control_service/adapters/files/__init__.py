"""Files of datasets: formats and compressions told by their bytes, rows read as a stream within limits."""
