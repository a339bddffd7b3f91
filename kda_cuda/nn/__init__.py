"""Layers and their caches, one kind a file; :mod:`kda_cuda.layers` and :mod:`kda_cuda.model` have all of them."""
