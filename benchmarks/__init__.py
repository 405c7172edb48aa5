"""Benchmarks of jaxdp; each one is a command, such as `python -m benchmarks.dp_sgd --help`."""
