"""The compiled forward pass: one C++ file, built on the machine that runs it, for processors with AVX-512 or AMX.

``compiler`` builds and caches the library, ``library`` calls it, ``plan`` says which models it computes and with what
weights, ``compilation`` does all three beside a server that already serves.
"""
