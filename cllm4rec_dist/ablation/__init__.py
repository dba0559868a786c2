"""`cllm4rec ablate`: train and evaluate variants of the method with several seeds, and compare them in a table."""
