"""What torch's and DeepSpeed's Adam have in common."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of the moments in the state of an optimizer."""
