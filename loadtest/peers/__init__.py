"""What a user would pick instead, installed, started and driven with the same texts in the same run.

``python -m loadtest.peers install|check|run`` (``make compare`` is ``run``). Each peer is a module with one class: what
it needs, how the checkpoint is prepared for it, how it is started and how it is called. README.md says why each is at
its best. A peer lives in a virtual environment of its own under a cache folder; nothing of it enters ours.
"""
