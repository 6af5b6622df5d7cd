"""A federation of nodes on this machine: `demo` for a first try, `loopback` for tests and benchmarks."""
