"""Names that torch's and DeepSpeed's Adam share."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of the moments in an optimizer's state."""
