"""What this machine has and lacks, and whether it computes what it should."""
