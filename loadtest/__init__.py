"""What we measure of ourselves: one command a figure, each with its JSON in ``results/``."""
