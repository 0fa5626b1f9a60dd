"""A study: many runs, planned, forecast, and run here or by SLURM."""
