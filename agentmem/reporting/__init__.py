"""What happened, for people and programs: reports, traces, pictures, log events."""
