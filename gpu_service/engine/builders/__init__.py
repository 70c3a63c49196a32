"""Builders by the names that the catalog gives:

one module an entry, the same attributes in every module of a folder.
"""
