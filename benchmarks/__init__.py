"""Speed against the loops that people use: `make bench`, or `make bench-gpu` on a GPU."""
