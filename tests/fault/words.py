"""Words for texts that are made at random: of the tiny tokenizer's vocabulary or not, and none that our own sentences
use, so that a text can be told from a message."""

from __future__ import annotations

WORDS = ["hello", "world", "a", "river", "stone", "lantern", "says", "to", "quiet", "today", "poplar", "x9"]
