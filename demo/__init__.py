"""A small language model trained twice, with softmax and with entmax attention: see `python -m demo --help`."""
