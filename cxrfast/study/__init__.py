"""Many runs as one: planned, forecast, carried out here or by SLURM."""
