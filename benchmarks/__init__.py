"""What an iteration costs here and elsewhere: `make bench`, docs/benchmarks.md."""
