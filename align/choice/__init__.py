"""Which technique fits a task, data and a machine, and an experiment to start with."""
