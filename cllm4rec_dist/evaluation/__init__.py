"""Evaluation of trained models and baselines: ranking, metrics, statistical tests and the report."""
