"""The model: a checkpoint read and checked, its tokenizer, and a backend that turns token ids into vectors."""
