"""What a recipe costs, by arithmetic alone: parameters, FLOPs, memory, communication, time and disk space."""
