"""The native kernel under sanitizers: `make fuzz`."""
