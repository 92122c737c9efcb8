"""The operations port: plain HTTP for probes and scrapers."""
