"""Whole released architectures, one a folder."""
