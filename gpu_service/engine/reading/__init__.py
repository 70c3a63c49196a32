"""Weights from files onto a device by many threads, and a 4-bit copy of them for the next time.

`stored` says what is where in safetensors files; `reader` moves pieces of them; `lanes` are a thread's buffers on a
device; `piece_digests` and `prequantized` are what a node keeps in its cache. Knows tensors and files; what model they
make is `engine.loading`'s business.
"""
