"""The operations inside the frameworks that people train with already.

A module for each. Each imports its framework when it is used, and of this package `ops` alone.
"""
