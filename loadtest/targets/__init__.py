"""Servers that a load test can drive, one protocol a file."""
