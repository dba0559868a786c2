"""Using a trained run in one process: the Python API, and what the service and the commands are built on."""
