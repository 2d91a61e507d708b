"""Training, wrapping and dropping for a long time: `make soak`."""
