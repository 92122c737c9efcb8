"""Packed passes on CUDA: graphs, staging, overlap. ``passes.py`` is the way in."""
