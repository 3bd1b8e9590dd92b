"""What every run needs: launch, precision, checkpoints, schedules, logs, kNN."""
