"""embedserve: text in, vectors out, in production."""

__all__ = ["__version__"]

__version__ = "0.1.0"
