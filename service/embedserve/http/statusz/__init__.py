"""The page of one process for people: ``/statusz`` and, for machines, ``/statusz.json``."""
