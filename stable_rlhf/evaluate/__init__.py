"""What a run is worth: calibration, per-task statistics, judged comparisons, and the report with its pictures."""
