"""Inference with a trained run: the Python API, batch recommendation and the HTTP service."""
