"""Runs on this node: admission, engines, journals, blobs, planning. Never imports torch, gRPC, or the wire's
messages.
"""
