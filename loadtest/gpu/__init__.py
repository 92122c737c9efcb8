"""Every mark of the GPU engine in one command: ``python -m loadtest.gpu``."""
