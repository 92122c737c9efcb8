"""Many texts from files into vectors in files: what ``embedserve embed`` does.

``source`` reads, ``remote`` or ``local`` embeds, ``sink`` writes, ``pipeline`` keeps the order and the bounds.
"""
