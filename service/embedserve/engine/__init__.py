"""The engine: from texts to vectors, without a transport."""
