"""A study: many runs, planned, forecast, and carried out here or by SLURM."""
