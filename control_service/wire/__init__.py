"""Values that both edges of control translate: contract messages on one side, domain values on the other.

The edge towards clients (`api`) and the edge towards nodes and the log (`adapters`) must not know each other; what both
have to say alike is said here, once. Nothing here calls, serves or stores.
"""
