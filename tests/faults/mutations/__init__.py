"""Mutation proof: each thing that keeps a promise is taken out of a copy of the product, and a listed test must see it.

A fence, fsync, key or lock whose loss no test notices is not kept by the tests, however green they are. Refuses to
touch the tree that it was started from.
"""
