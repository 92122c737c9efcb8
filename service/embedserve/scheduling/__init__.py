"""The scheduler core: pure, deterministic, standard library only.

Nothing here imports asyncio, threads, clocks, logging, numpy or anything else of embedserve. Time is an argument, every
expected outcome is a return value, and the same event log gives the same decisions byte for byte.
"""
