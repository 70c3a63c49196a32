"""The parent of one engine: outlives the GPU server, reaps and kills every descendant, and says how an engine ended.

Leans on the standard library and the journal alone. Refuses to know anything of training, models or gRPC.
"""
