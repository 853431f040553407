"""Everything that runs on a machine with a GPU, by one command: `make gpu`, which is `python -m benchmarks.gpu`."""
