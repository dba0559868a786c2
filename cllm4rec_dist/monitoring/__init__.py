"""Progress reports of a run: banner, metrics, trackers and status."""
