"""Reports, traces, plots and log events: the records of what a run did, for people and programs."""
