"""What stages share: training, sampling, answers of several versions, the plan of a dry run."""
