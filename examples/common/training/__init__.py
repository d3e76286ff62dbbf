"""The training loop, devices and precision, several processes, memory."""
